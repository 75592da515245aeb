# SPDX-License-Identifier: Apache-2.0
"""Kernels of one sweep over the similarity matrix that reduces every row and every column.

Each program makes one tile of student logits z (and of teacher logits t) in registers, takes one
exponential an element, and reduces it along both directions. Sums leave out the positives. Tiles
write partial sums, which ``similarity_finalise.py`` adds up in a fixed order: no atomics, equal
from run to run. Rows are swept in strips, so that the partial sums stay within a budget.

The exponentials are relative to a fixed shift ``max(scale - 60, 0)``: sums of different tiles, and
the rows and columns of one tile, then share them. With unit features no sum can overflow. Where one
is so small that its terms may have vanished (scale above 55, and a row whose every cosine is below
(scale - 115) / scale), a flag is raised on the device and the sweep is repeated with each tile's
own maximum; the repetition is always launched and returns at once where the flag is down, so the
host never waits.
"""

import triton
import triton.language as tl

from kdengine_kernels.common import (
    LOG2E,
    fixed_shift,
    shifted_exp,
    tile_numbers,
    tile_product,
)

# stands for minus infinity where a difference of two must not be NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _reduce(
    at,
    slot_stride,
    items,
    x,
    exponential,
    inside,
    first,
    second,
    AXIS: tl.constexpr,
    NUM_WEIGHTED: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Store a tile's sums along AXIS: [top,] total, and sums of ``first`` and ``second``."""
    if ONLINE:
        top = tl.maximum(tl.max(tl.where(inside, x, LOWEST), AXIS), LOWEST)
        exponential = tl.exp2((x - tl.expand_dims(top, AXIS)) * LOG2E)
        tl.store(at, top, mask=items)
    e = tl.where(inside, exponential, 0.0)
    tl.store(at + slot_stride, tl.sum(e, AXIS), mask=items)
    if NUM_WEIGHTED > 0:
        tl.store(at + 2 * slot_stride, tl.sum(e * first, AXIS), mask=items)
    if NUM_WEIGHTED > 1:
        tl.store(at + 3 * slot_stride, tl.sum(e * second, AXIS), mask=items)


@triton.jit
def row_others(labels, rows, cols, row_here, col_here):
    """The cells of a tile that are not their row's positive."""
    label = tl.load(labels + rows, mask=row_here, other=-1).to(tl.int32)
    return row_here[:, None] & col_here[None, :] & (cols[None, :] != label[:, None])


@triton.jit
def col_others(col_labels, rows, cols, row_here, col_here):
    """The cells of a tile that are not their column's positive."""
    label = tl.load(col_labels + cols, mask=col_here, other=-1).to(tl.int32)
    return row_here[:, None] & col_here[None, :] & (rows[:, None] != label[None, :])


@triton.jit
def _statistics_kernel(
    query,
    key,
    scale,
    teacher_query,
    teacher_key,
    teacher_scale,
    labels,
    col_labels,
    row_parts,
    col_parts,
    logits,
    teacher_logits,
    flag,
    first_row,
    end_row,
    num_cols,
    num_tiles,
    row_stride,
    row_slot,
    col_stride,
    col_slot,
    logits_stride,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    MEANS: tl.constexpr,
    KEEP: tl.constexpr,
    ONLINE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    if ONLINE:
        if tl.load(flag) == 0:
            return
    # a repetition has fewer programs than tiles; in any other launch this is no loop at all
    remaining = num_tiles - tl.program_id(0)
    for turn in (range if ONLINE else tl.static_range)(
        tl.cdiv(remaining, tl.num_programs(0)) if ONLINE else 1
    ):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        row_tile, col_tile = tile_numbers(
            tile, end_row - first_row, num_cols, BLOCK_ROWS, BLOCK_COLS, GROUP
        )
        row0, col0 = first_row + row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
        s = tl.load(scale).to(tl.float32)
        z = s * tile_product(
            query,
            key,
            row0,
            col0,
            end_row,
            num_cols,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_K,
            PRECISION,
            TMA,
        )
        rows = row0 + tl.arange(0, BLOCK_ROWS)
        cols = col0 + tl.arange(0, BLOCK_COLS)
        row_here, col_here = rows < end_row, cols < num_cols
        if KEEP:
            here = row_here[:, None] & col_here[None, :]
            place = (rows.to(tl.int64) * logits_stride)[:, None] + cols[None, :]
            tl.store(logits + place, z, mask=here)
        row_out = row_parts + col_tile.to(tl.int64) * row_stride + rows - first_row
        col_out = col_parts + row_tile.to(tl.int64) * col_stride + cols
        if ROWS or COLS:
            e = shifted_exp(z, fixed_shift(s))
            if ROWS:
                inside = row_others(labels, rows, cols, row_here, col_here)
                _reduce(row_out, row_slot, row_here, z, e, inside, z, z, 1, MEANS, ONLINE)
                row_out += (2 + MEANS) * row_slot
            if COLS:
                inside = col_others(col_labels, rows, cols, row_here, col_here)
                _reduce(col_out, col_slot, col_here, z, e, inside, z, z, 0, MEANS, ONLINE)
                col_out += (2 + MEANS) * col_slot
        if SOFT_ROWS or SOFT_COLS:
            r = tl.load(teacher_scale).to(tl.float32)
            t = r * tile_product(
                teacher_query,
                teacher_key,
                row0,
                col0,
                end_row,
                num_cols,
                TEACHER_WIDTH,
                BLOCK_ROWS,
                BLOCK_COLS,
                BLOCK_K,
                TEACHER_PRECISION,
                TMA,
            )
            if KEEP:
                here = row_here[:, None] & col_here[None, :]
                place = (rows.to(tl.int64) * logits_stride)[:, None] + cols[None, :]
                tl.store(teacher_logits + place, t, mask=here)
            q = shifted_exp(t, fixed_shift(r))
            # looked up again: masks that live through a product would take up registers
            if SOFT_ROWS:
                inside = row_others(labels, rows, cols, row_here, col_here)
                _reduce(row_out, row_slot, row_here, t, q, inside, t - z, t, 1, 2, ONLINE)
            if SOFT_COLS:
                inside = col_others(col_labels, rows, cols, row_here, col_here)
                _reduce(col_out, col_slot, col_here, t, q, inside, t - z, t, 0, 2, ONLINE)
