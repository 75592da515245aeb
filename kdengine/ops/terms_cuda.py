# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``terms``: ``csrc/terms.h``, on GPUs and, in C++, on the CPU.

Launches: one forward and one backward, whatever the number of items.
"""

from collections.abc import Sequence

from torch import Tensor

from kdengine.ops import extension
from kdengine.ops.feature_cuda import rows as with_neighbours


def forward(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: Sequence[int],
    shares: Sequence[float],
    hard: Sequence[bool],
    soft: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Means and teachers' entropies; see ``kdengine.ops.terms``."""
    given = _given(rows, cols, labels, col_labels)
    like = [*rows, *cols][0]
    values, entropies = like.new_empty(sum(hard) + sum(soft)), like.new_empty(sum(soft))
    extension.call("terms_forward", *given, limits, shares, hard, soft, values, entropies)
    return values, entropies


def backward(
    grads: Tensor,
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: Sequence[int],
    shares: Sequence[float],
    hard: Sequence[bool],
    soft: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of others, positive and gap of the rows, then of the columns."""
    given = _given(rows, cols, labels, col_labels)
    # contiguous, whatever the statistics are
    a, b, c = (grads.new_empty(rows[i].shape if rows else 0) for i in (0, 1, 4))
    d, e, f = (grads.new_empty(cols[i].shape if cols else 0) for i in (0, 1, 4))
    extension.call(
        "terms_backward", grads.contiguous(), *given, limits, shares, hard, soft, [a, b, c, d, e, f]
    )
    return a, b, c, d, e, f


def _given(
    rows: Sequence[Tensor], cols: Sequence[Tensor], labels: Tensor, col_labels: Tensor
) -> list[list[Tensor]]:
    """Statistics and labels with neighbouring elements in a row; teachers keep their stride."""
    sides = [
        [x.contiguous() if x.dim() < 2 else with_neighbours(x) for x in side]
        for side in (rows, cols)
    ]
    return [*sides, [labels.contiguous(), col_labels.contiguous()]]
