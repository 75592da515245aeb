# SPDX-License-Identifier: Apache-2.0
"""The two halves of the op ``gradient``, for a block of rows of the matrix.

Over W ranks each has n rows of x and n of y and computes the n x N block of its rows: what belongs
to the rows is complete, of the columns' sums and gradients it has a part. Column j's parts go to
the rank that has y_j, which adds them up, and tells all ranks the sums that they need:

    forward     all y -> log-sum-exps of rows, parts of those of columns   | home, then to all
                      -> g_x of the rows, a part of every g_y              | home
    backward    all r -> means of H over rows, parts of those of columns   | home, then to all
                      -> dx of the rows, a part of every dy                | home

With one rank nothing moves. ``Spread`` is what does with several.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kdengine.ops import _backend

# logits of H are scaled to at most this: far above float32's noise in the teacher's logits
LARGEST = 20.0


class Spread(Protocol):
    """What moves where the rows of both features are spread over W ranks, n each, in their order.

    ``kdengine.distributed.Exchange`` is one.
    """

    rank: int

    def gather(self, x: Tensor) -> Tensor:
        """This rank's (n, ...) with those of the others: (W n, ...)."""
        ...

    def to_owners(self, x: Tensor) -> Tensor:
        """Numbers of all columns, (F, W n), to their owners: (W, F, n) about this rank's."""
        ...

    def sum_home(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of all, (W n, D), to their owners, in ``dtype``: the sum of this rank's, (n, D)."""
        ...


class Whole:
    """One rank has everything: nothing moves."""

    rank = 0

    def gather(self, x: Tensor) -> Tensor:
        """All rows are here."""
        return x

    def to_owners(self, x: Tensor) -> Tensor:
        """One part."""
        return x[None]

    def sum_home(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Not rounded."""
        return x


def forward(
    query: Tensor, key: Tensor, scale: Tensor, spread: Spread, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of InfoNCE at this rank's rows, and what ``backward`` needs.

    Shapes: query (n, D) of this rank, key (W n, D) of all. Returns: g_x and g_y (n, D); log-sum-exp
    without the positive and the positive, of these rows (2, n) and of all columns (2, W n).
    """
    # before anything is computed that the backward could do nothing with
    _backend.choose("gradient", [query, key], backend)
    dtype, total = _backend.statistics_dtype(query, key), len(key)
    labels, none = _pairs(query, key, spread), query.new_empty(0)
    rows, part, soft_rows, soft_cols, *_ = torch.ops.kdengine.similarity_forward(
        *(query, key, scale, *labels, [], [], none),
        *(True, True, False, False, False, False, False, backend),
    )
    # the positive is in one part, and 0 in the others
    lse, positive = spread.to_owners(part).unbind(1)
    cols = spread.gather(torch.stack([lse.logsumexp(0), positive.sum(0)], 1)).mT.contiguous()
    # N times the gradient of the loss, which float16 can hold
    outside = [(x[0] - x[1]).sigmoid() / 2 for x in (rows, cols)]
    grads = [torch.stack([x, -x]) for x in outside]
    grad_query, grad_key, _ = torch.ops.kdengine.similarity_backward(
        *([*grads, soft_rows, soft_cols], query, key, scale, *labels, [], [], none),
        *([rows, cols, soft_rows, soft_cols], query.new_empty(0, 0, 0)),
        *(True, True, False, backend),
    )
    grad_key = spread.sum_home(grad_key, key.dtype)
    return grad_query.to(dtype) / total, grad_key.to(dtype) / total, rows, cols


def backward(
    upstream: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    grads: Sequence[Tensor],
    spread: Spread,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, of this rank's rows of key, (n, D), and of scale, a part of the sum.

    Args:
        upstream: u and r, this rank's (n, D).
        query: (n, D) of this rank.
        key: (W n, D) of all.
        scale: 0-D.
        rows: from ``forward``.
        cols: from ``forward``.
        grads: g_x and g_y of ``forward``.
        spread: as in ``forward``.
        backend: as in ``forward``.
    """
    dtype = rows.dtype
    # products of gradients leave the range of float16
    x, y = (v.float() if v.dtype == torch.float16 else v for v in (query, key))
    u, own_r = (v.to(dtype) for v in upstream)
    r = spread.gather(own_r.to(y.dtype))
    # to lengths of at most 1, whatever the upstream gradient, and without a rounding
    longest = torch.maximum(u.norm(dim=1).amax(), r.to(dtype).norm(dim=1).amax())
    size = longest.clamp(min=1e-30).log2().ceil().exp2()
    left, right = (u / size).to(x.dtype), (r / size).to(y.dtype)
    pulls = _pulls(x, y, scale, rows, cols, left, right, size, spread, backend)
    g_r, a_y, g_u, a_x = _products(x, y, scale, *pulls, left, right, backend)
    scale = scale.to(dtype)
    rate = scale / len(key) * size
    # the strips hold H times LARGEST / 2
    a_y = rate / (LARGEST / 2) * a_y
    found_query = rate * g_r + scale * a_y
    found_key = rate * g_u + scale * rate / (LARGEST / 2) * a_x
    through_g = ((u * grads[0]).sum() + (own_r * grads[1]).sum()) / scale
    found_scale = (a_y * query).sum() + through_g
    found_key = spread.sum_home(found_key, y.dtype)
    return found_query.to(query.dtype), found_key.to(key.dtype), found_scale


def _pairs(query: Tensor, key: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """Numbers of the rows' and of the columns' positives, outside where these are not here."""
    first = spread.rank * len(query)
    row, col = (torch.arange(len(x), device=query.device) for x in (query, key))
    return row + first, col - first


def _pulls(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    left: Tensor,
    right: Tensor,
    size: Tensor,
    spread: Spread,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Of rows and of columns (2, n): log-sum-exp and mean of H; diagonals of G and dA; their place.

    H is scaled by LARGEST / 2. With p the probability of the positive and m the mean of H over the
    others: rowsum(P H) = (1 - p) m + p H_ii, and H_ii minus that is (1 - p) (H_ii - m).
    """
    first, half = spread.rank * len(x), LARGEST / 2
    here = slice(first, first + len(x))
    labels = _pairs(x, y, spread)
    of_rows, of_cols = torch.ops.kdengine.similarity_forward(
        *(torch.cat([left, x], 1), torch.cat([y, right], 1), scale.new_full((), half), *labels),
        *([x], [y], scale.reshape(1)),
        *(False, False, True, True, False, False, False, backend),
    )[2:4]
    # a row without others, or without them here, has no mean
    row_mean, col_mean = (
        torch.where(part[0, 0] > -torch.inf, part[0, 3] - part[0, 2], 0)
        for part in (of_rows, of_cols)
    )
    # each rank's part of the mean over all rows
    weight = torch.where(cols[0] > -torch.inf, (of_cols[0, 0] - cols[0]).exp(), 0)
    # ranks differ in how they scale
    col_mean = spread.to_owners((size * weight * col_mean)[None])[:, 0].sum(0) / size
    diagonal = half * ((left * y[here]).sum(1) + (x * right[here]).sum(1))
    means, diagonals = [], torch.zeros_like(rows)
    for (others, positive), mean in ((rows, row_mean), (cols[:, here], col_mean)):
        outside = (others - positive).sigmoid()
        means.append(outside * mean + (1 - outside) * diagonal)
        pulled = (1 - outside) * outside * (diagonal - mean)
        diagonals += torch.stack([-outside / 2, pulled / 2])
    means[1] = spread.gather(size * means[1]) / size
    both = zip((rows, cols), means, strict=True)
    of_rows, of_cols = (torch.stack([torch.logaddexp(*side), mean]) for side, mean in both)
    return of_rows, of_cols, diagonals, first


@torch.library.custom_op("kdengine::gradient_products", mutates_args=())
def _products(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    diagonals: Tensor,
    first: int,
    left: Tensor,
    right: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _backend.choose("gradient", [query, key], backend)
    with _backend.running(query):
        return module.backward(
            *(query, key, scale, rows, cols, diagonals, first, left, right, LARGEST / 2),
            _backend.workspace(query),
        )


@_products.register_fake
def _products_fake(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    diagonals: Tensor,
    first: int,
    left: Tensor,
    right: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape, dtype=rows.dtype),
        query.new_empty(query.shape, dtype=rows.dtype),
        key.new_empty(key.shape, dtype=rows.dtype),
        key.new_empty(key.shape, dtype=rows.dtype),
    )
