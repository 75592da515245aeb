# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``assign`` and ``range_join``: tiles of products that are never stored.

``nearest``: a program holds a block of rows and goes over a part of the keys, with the greatest
scores of each row in a list in registers. A row's greatest score of a tile is compared with the
least of its list; while it is greater for some row, it takes that place and is struck out of the
tile. Most tiles of a long part hold nothing new, and cost one maximum. The lists of all parts are
merged afterwards.

``pairs``: two passes of the same product. The first counts each row's pairs; their running sum says
where each row's begin, and the second writes them there, in order. No atomics, so equal runs give
equal lists.

FLOPs: 2 N K D, and twice that for pairs (half of the tiles for a triangle). Bytes: each tile reads
both operands; lists 8 bytes an entry, pairs 12 bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdengine_kernels.common import Matrix, has_tma, num_processors, tile_product
from kdengine_kernels.tuning import Config, config

# lists longer than this leave room for smaller tiles only
SHORT = 8
# columns that a part has at least, in tiles
MIN_TILES = 4


@triton.jit
def _nearest_kernel(
    query,
    key,
    half,
    values,
    index,
    num_rows,
    num_cols,
    part_cols,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The SLOTS greatest ``<x, key> - half`` of each row within a part of the keys, in no order."""
    first_row, part = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    end_col = tl.minimum(num_cols, (part + 1) * part_cols)
    slots, tile_cols = tl.arange(0, SLOTS), tl.arange(0, BLOCK_COLS)
    best = tl.full((BLOCK_ROWS, SLOTS), float("-inf"), tl.float32)
    keys = tl.zeros((BLOCK_ROWS, SLOTS), tl.int32)
    for first_col in range(part * part_cols, end_col, BLOCK_COLS):
        tile = tile_product(
            query,
            key,
            first_row,
            first_col,
            num_rows,
            num_cols,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_K,
            PRECISION,
            TMA,
        )
        cols = first_col + tile_cols
        tile -= tl.load(half + cols, mask=cols < end_col, other=float("inf"))[None, :]
        least, slot = tl.min(best, 1, return_indices=True)
        most, at = tl.max(tile, 1, return_indices=True)
        more = tl.max((most > least).to(tl.int32), 0)
        while more > 0:
            takes = (slots[None, :] == slot[:, None]) & (most > least)[:, None]
            best = tl.where(takes, most[:, None], best)
            keys = tl.where(takes, (first_col + at)[:, None], keys)
            tile = tl.where(tile_cols[None, :] == at[:, None], float("-inf"), tile)
            least, slot = tl.min(best, 1, return_indices=True)
            most, at = tl.max(tile, 1, return_indices=True)
            more = tl.max((most > least).to(tl.int32), 0)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    place = (part * num_rows + rows).to(tl.int64)[:, None] * SLOTS + slots[None, :]
    here = (rows < num_rows)[:, None]
    tl.store(values + place, best, mask=here)
    tl.store(index + place, keys, mask=here)


@triton.jit
def _pairs_kernel(
    query,
    key,
    row_squares,
    col_squares,
    starts,
    counts,
    first,
    second,
    squares,
    limit,
    num_rows,
    num_cols,
    part_cols,
    FILL: tl.constexpr,
    TRIANGLE: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Count each row's pairs within a part of the columns, or write them from ``starts`` on.

    ``counts`` and ``starts`` are (num_rows, number of parts).
    """
    first_row, part = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_at = tl.minimum(rows, num_rows - 1)
    slot = row_at.to(tl.int64) * tl.num_programs(1) + part
    begin = part * part_cols
    end_col = tl.minimum(num_cols, begin + part_cols)
    if TRIANGLE:
        # tiles that hold only columns before the rows have no pair
        begin = tl.maximum(begin, first_row // BLOCK_COLS * BLOCK_COLS)
    bound = tl.load(limit)
    if FILL:
        total = tl.load(starts + slot)
    else:
        total = tl.zeros((BLOCK_ROWS,), tl.int64)
    for first_col in range(begin, end_col, BLOCK_COLS):
        tile = tile_product(
            query,
            key,
            first_row,
            first_col,
            num_rows,
            num_cols,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_K,
            PRECISION,
            TMA,
        )
        cols = first_col + tl.arange(0, BLOCK_COLS)
        along = tl.load(row_squares + row_at)
        across = tl.load(col_squares + cols, mask=cols < end_col, other=float("inf"))
        tile = along[:, None] + (across[None, :] - 2.0 * tile)
        near = (tile <= bound) & (rows < num_rows)[:, None]
        if TRIANGLE:
            near = near & (rows[:, None] < cols[None, :])
        hits = near.to(tl.int32)
        found = tl.sum(hits, 1)
        if FILL:
            if tl.max(found, 0) > 0:
                place = total[:, None] + (tl.cumsum(hits, 1) - hits)
                tl.store(first + place, tl.broadcast_to(rows[:, None], hits.shape), mask=near)
                tl.store(second + place, tl.broadcast_to(cols[None, :], hits.shape), mask=near)
                tl.store(squares + place, tile, mask=near)
        total += found
    if not FILL:
        tl.store(counts + slot, total, mask=rows < num_rows)


def nearest(x: Tensor, key: Tensor, half: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest scores of each row and their keys; see the ``torch`` backend."""
    slots = triton.next_power_of_2(count)
    matrix = _matrix(x, key)
    num_rows, num_cols = len(x), len(key)
    blocks = config("nearest" if slots <= SHORT else "nearest_many", matrix.left.itemsize)
    parts, part_cols = _parts(x, num_rows, num_cols, blocks)
    values = x.new_empty(parts, num_rows, slots, dtype=torch.float32)
    index = x.new_empty(parts, num_rows, slots, dtype=torch.int32)
    if num_rows:
        left, right, _ = matrix.operands(blocks)
        _nearest_kernel[(triton.cdiv(num_rows, blocks.rows), parts)](
            left,
            right,
            half,
            values,
            index,
            num_rows,
            num_cols,
            part_cols,
            SLOTS=slots,
            **_constants(matrix, blocks),
        )
    values, index = (t.transpose(0, 1).flatten(1) for t in (values, index))
    best, order = values.topk(count, 1)
    return best, index.gather(1, order).long()


def pairs(
    x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor, limit: float, triangle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs within the limit, in ascending order; see the ``torch`` backend."""
    matrix = _matrix(x, y)
    num_rows, num_cols = len(x), len(y)
    itemsize = matrix.left.itemsize
    parts, part_cols = _parts(x, num_rows, num_cols, config("pairs", itemsize))
    counts = x.new_zeros(num_rows, parts, dtype=torch.int64)
    bound = x.new_full((1,), limit, dtype=torch.float32)
    found = [x.new_empty(0, dtype=t) for t in (torch.int32, torch.int32, torch.float32)]
    starts = counts
    for fill in (False, True):
        if fill:
            ends = counts.flatten().cumsum(0)
            starts = (ends - counts.flatten()).view_as(counts)
            total = int(ends[-1]) if len(ends) else 0
            found = [t.new_empty(total) for t in found]
        if not num_rows or not num_cols or (fill and not total):
            continue
        blocks = config("write_pairs" if fill else "pairs", itemsize)
        left, right, _ = matrix.operands(blocks)
        _pairs_kernel[(triton.cdiv(num_rows, blocks.rows), parts)](
            left,
            right,
            x_squares,
            y_squares,
            starts,
            counts,
            *found,
            bound,
            num_rows,
            num_cols,
            part_cols,
            FILL=fill,
            TRIANGLE=triangle,
            **_constants(matrix, blocks),
        )
    first, second, squares = found
    return first.long(), second.long(), squares


def _matrix(x: Tensor, key: Tensor) -> Matrix:
    return Matrix.of(x, key, x.new_ones(1))


def _parts(x: Tensor, num_rows: int, num_cols: int, blocks: Config) -> tuple[int, int]:
    """Parts of the columns, so that few rows fill the processors too, and the columns of one."""
    tiles = triton.cdiv(num_cols, blocks.cols)
    wanted = 2 * num_processors(x.device) // max(1, triton.cdiv(num_rows, blocks.rows))
    parts = max(1, min(wanted, tiles // MIN_TILES))
    part_cols = max(1, triton.cdiv(tiles, parts)) * blocks.cols
    return max(1, triton.cdiv(num_cols, part_cols)), part_cols


def _constants(matrix: Matrix, blocks: Config) -> dict[str, Any]:
    return {
        "WIDTH": matrix.left.shape[1],
        "TMA": has_tma(matrix.left.device),
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLS": blocks.cols,
        "BLOCK_K": blocks.k,
        "PRECISION": matrix.precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
