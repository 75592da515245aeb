# SPDX-License-Identifier: Apache-2.0
"""The backward of ``similarity``: which way its strips run, and in which blocks.

A strip of rows gives its rows' gradient whole, but only a part of every key's, so that these are
summed in float32: 4 M D bytes, which every strip reads and writes. Where there are more columns
than rows, strips run along the columns instead; that is the backward of the transposed matrix.

Where the sum still needs too much memory, keys go in blocks of columns: each key's sum is complete
when its block is, and is rounded into the result at once. What that costs is to make every matrix
a second time: one product more a matrix.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# columns of a block are a multiple of this, the widest tile of a kernel
ROUND = 256


def num_columns(key: Tensor, sum_bytes: int | None) -> int:
    """Columns of a block whose float32 sum fits; all of them where there is no limit or no sum."""
    if sum_bytes is None or key.dtype in (torch.float32, torch.float64):
        return len(key)
    return max(1, sum_bytes // (4 * key.shape[1]) // ROUND) * ROUND


def backward(
    module: ModuleType,
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    statistics: Sequence[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    budget: int,
    sum_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's ``backward``, along the longer side, in blocks as ``sum_bytes`` asks for."""
    # kept logits lie in rows
    if need_key and len(key) > len(query) and not len(logits):
        grad_key, grad_query, grad_scale = backward(
            module,
            [grads[i] for i in (1, 0, 3, 2)],
            key,
            query,
            scale,
            col_labels,
            labels,
            teacher_key,
            teacher_query,
            teacher_scale,
            [statistics[i] for i in (1, 0, 3, 2)],
            logits,
            need_key,
            need_query,
            need_scale,
            budget,
            sum_bytes,
        )
        return grad_query, grad_key, grad_scale
    width = num_columns(key, sum_bytes)

    def run(part: slice, budget: int, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
        return module.backward(
            [grads[0], grads[1][:, part], grads[2], grads[3][:, :, part]],
            query,
            key[part],
            scale,
            # labels outside the block name no cell of it
            labels - part.start,
            col_labels[part],
            teacher_query,
            [v[part] for v in teacher_key],
            teacher_scale,
            [statistics[0], statistics[1][:, part], statistics[2], statistics[3][:, :, part]],
            logits[:, :, part] if len(logits) else logits,
            *needs,
            budget,
        )

    everything = slice(0, len(key))
    if not need_key or width >= len(key):
        return run(everything, budget, need_query, need_key, need_scale)
    grad_query, grad_scale = query.new_empty(0), scale.new_empty(0)
    if need_query or need_scale:
        grad_query, _, grad_scale = run(everything, budget, need_query, False, need_scale)
    grad_key = torch.empty_like(key)
    for first in range(0, len(key), width):
        part = slice(first, min(first + width, len(key)))
        grad_key[part] = run(part, budget - (sum_bytes or 0), False, True, False)[1]
    return grad_query, grad_key, grad_scale
