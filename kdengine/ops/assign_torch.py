# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``assign`` and ``range_join``: tiles of products, on any device."""

import torch
from torch import Tensor

from kdengine.ops._backend import statistics_dtype, workspace

# rows of a tile: enough for the library's fast products
HEIGHT = 1024
# columns whose maximum stands for them
GROUP = 32


def nearest(x: Tensor, key: Tensor, half: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest scores ``<x_i, key_k> - half_k`` of each row.

    Shapes: x (N, D), key (K, D), half (K,).
    Returns: scores (N, count) in descending order and their keys (N, count) int64; no other key
    scores above the last. Of equal scores any.
    """
    dtype = statistics_dtype(x, key)
    values = x.new_empty(len(x), count, dtype=dtype)
    index = x.new_empty(len(x), count, dtype=torch.int64)
    width = max(count, _width(x, dtype))
    for begin in range(0, len(x), HEIGHT):
        rows = slice(begin, begin + HEIGHT)
        block = x[rows].to(dtype)
        best = block.new_full((len(block), count), -torch.inf)
        where = torch.zeros_like(best, dtype=torch.int64)
        for first in range(0, len(key), width):
            cols = slice(first, first + width)
            tile = torch.addmm(-half[cols], block, key[cols].to(dtype).mT)
            # most tiles hold nothing new for most rows
            hot = (tile.amax(1) > best[:, -1]).nonzero()[:, 0]
            if not len(hot):
                continue
            top, at = _top(tile if len(hot) == len(tile) else tile[hot], count)
            scores, keys = torch.cat([best[hot], top], 1), torch.cat([where[hot], at + first], 1)
            best[hot], order = scores.topk(count, 1)
            where[hot] = keys.gather(1, order)
        values[rows], index[rows] = best, where
    return values, index


def _top(tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest ``count`` of each row, or all: values and columns, in no order.

    They lie in the groups with the greatest maxima, which are quick to find.
    """
    rows, cols = tile.shape
    if cols <= 2 * count * GROUP:
        return tile.topk(min(count, cols), 1)
    padded = torch.nn.functional.pad(tile, (0, -cols % GROUP), value=-torch.inf)
    groups = padded.view(rows, -1, GROUP)
    best = groups.amax(2).topk(count, 1).indices
    values = groups.gather(1, best[..., None].expand(-1, -1, GROUP)).view(rows, -1)
    top, at = values.topk(count, 1)
    return top, best.gather(1, at // GROUP) * GROUP + at % GROUP


def pairs(
    x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor, limit: float, triangle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs with ``|x_i|^2 + |y_j|^2 - 2 <x_i, y_j> <= limit``, with i < j for a triangle.

    Shapes: x (N, D), y (M, D), x_squares (N,), y_squares (M,).
    Returns: i and j int64, in ascending order, and the left sides.
    """
    dtype = statistics_dtype(x, y)
    found = []
    width = _width(x, dtype)
    for begin in range(0, len(x), HEIGHT):
        rows = slice(begin, begin + HEIGHT)
        block = x[rows].to(dtype)
        strip = []
        for first in range(begin if triangle else 0, len(y), width):
            cols = slice(first, first + width)
            tile = torch.addmm(y_squares[cols], block, y[cols].to(dtype).mT, alpha=-2)
            tile += x_squares[rows, None]
            i, j = (tile <= limit).nonzero(as_tuple=True)
            value = tile[i, j]
            if triangle:
                ahead = i + begin < j + first
                i, j, value = i[ahead], j[ahead], value[ahead]
            strip.append((i + begin, j + first, value))
        if strip:
            i, j, value = (torch.cat(parts) for parts in zip(*strip, strict=True))
            # a row's pairs come tile after tile
            order = i.sort(stable=True).indices
            found.append((i[order], j[order], value[order]))
    if not found:
        none = x.new_empty(0, dtype=torch.int64)
        return none, none, x.new_empty(0, dtype=dtype)
    i, j, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return i, j, value


def _width(x: Tensor, dtype: torch.dtype) -> int:
    """Columns of a tile: it, its copy and the keys' within the workspace."""
    budget = workspace(x) // dtype.itemsize
    return max(1, budget // (3 * HEIGHT + x.shape[1]))
