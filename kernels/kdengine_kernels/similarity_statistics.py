# SPDX-License-Identifier: Apache-2.0
"""Kernels of one sweep over the similarity matrix that reduces every row and every column.

Each program makes one tile of student logits z (and of teacher logits t) in registers, takes one
exponential an element, and reduces it along both directions. Sums leave out the positives. Tiles
write partial sums, which a second kernel adds up in a fixed order: no atomics, equal from run to
run. Rows are swept in strips, so that the partial sums stay within a budget.

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

# totals outside this range are summed again, relative to their largest terms
SMALLEST, LARGEST = tl.constexpr(2.0**-80), tl.constexpr(1e36)
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
    label = tl.load(labels + rows, mask=row_here, other=-1)
    return row_here[:, None] & col_here[None, :] & (cols[None, :] != label[:, None])


@triton.jit
def col_others(col_labels, rows, cols, row_here, col_here):
    """The cells of a tile that are not their column's positive."""
    label = tl.load(col_labels + cols, mask=col_here, other=-1)
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


@triton.jit
def _combine_kernel(
    parts,
    running,
    out,
    scale,
    flag,
    num_parts,
    num_items,
    slot_stride,
    part_stride,
    running_stride,
    out_stride,
    NUM_WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ONLINE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up partial sums; with LAST turn them into a log-sum-exp and weighted means."""
    if ONLINE:
        if tl.load(flag) == 0:
            return
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = items < num_items
    own = running + items
    shift = fixed_shift(tl.load(scale).to(tl.float32))
    top = tl.full((BLOCK,), LOWEST, tl.float32) if ONLINE else tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    if not FIRST:
        if ONLINE:
            top = tl.load(own, mask=here, other=0.0)
        total = tl.load(own + running_stride, mask=here, other=0.0)
        if NUM_WEIGHTED > 0:
            first = tl.load(own + 2 * running_stride, mask=here, other=0.0)
        if NUM_WEIGHTED > 1:
            second = tl.load(own + 3 * running_stride, mask=here, other=0.0)
    for start in range(0, num_parts, BLOCK_PARTS):
        numbers = start + tl.arange(0, BLOCK_PARTS)
        mask = (numbers < num_parts)[:, None] & here[None, :]
        at = parts + numbers.to(tl.int64)[:, None] * part_stride + items[None, :]
        more = tl.load(at + slot_stride, mask=mask, other=0.0)
        factor = tl.zeros_like(more) + 1.0
        if ONLINE:
            tops = tl.load(at, mask=mask, other=LOWEST)
            higher = tl.maximum(top, tl.max(tops, 0))
            factor = tl.exp2((tops - higher[None, :]) * LOG2E)
            shrink = tl.exp2((top - higher) * LOG2E)
            top, total, first, second = higher, total * shrink, first * shrink, second * shrink
        total += tl.sum(more * factor, 0)
        if NUM_WEIGHTED > 0:
            first += tl.sum(tl.load(at + 2 * slot_stride, mask=mask, other=0.0) * factor, 0)
        if NUM_WEIGHTED > 1:
            second += tl.sum(tl.load(at + 3 * slot_stride, mask=mask, other=0.0) * factor, 0)
    if LAST:
        if not ONLINE:
            top += shift
            odd = here & ((total < SMALLEST) | (total > LARGEST) | (total != total))
            if tl.max(odd.to(tl.int32), 0) > 0:
                tl.atomic_max(flag, 1)
        lse = tl.where(total > 0, top + tl.log(total), float("-inf"))
        divisor = tl.where(total > 0, total, 1.0)
        tl.store(out + items, lse, mask=here)
        if NUM_WEIGHTED > 0:
            tl.store(out + 2 * out_stride + items, first / divisor, mask=here)
        if NUM_WEIGHTED > 1:
            tl.store(out + 3 * out_stride + items, second / divisor, mask=here)
    else:
        tl.store(own, top, mask=here)
        tl.store(own + running_stride, total, mask=here)
        if NUM_WEIGHTED > 0:
            tl.store(own + 2 * running_stride, first, mask=here)
        if NUM_WEIGHTED > 1:
            tl.store(own + 3 * running_stride, second, mask=here)


@triton.jit
def _positive_kernel(
    left,
    right,
    scale,
    labels,
    out,
    num_items,
    limit,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logit that each item's label names; 0 where the label is outside the matrix."""
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = items < num_items
    label = tl.load(labels + items, mask=here, other=-1)
    inside = here & (label >= 0) & (label < limit)
    k = tl.arange(0, BLOCK_K)
    left_at = left + items.to(tl.int64)[:, None] * WIDTH + k[None, :]
    right_at = right + tl.where(inside, label, 0).to(tl.int64)[:, None] * WIDTH + k[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        mask = inside[:, None] & (start + k < WIDTH)[None, :]
        a = tl.load(left_at + start, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(right_at + start, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    tl.store(out + items, total * tl.load(scale).to(tl.float32), mask=here)
