# SPDX-License-Identifier: Apache-2.0
"""Kernels that write the gradient of a strip of logits.

With the statistics of the forward and what the loss wants of them (``weight``), the gradient of
logit z_ij is

    weight_i exp(z_ij - others_i)  -  sum_k teacher_weight_i exp(t_ij - teacher_others_i)

for the rows, plus the same for the columns; at a positive of its row, what the loss wants of that
positive stands in place of the row's part, and likewise for its column. ``_gradient_kernel``
subtracts in float32 and rounds once, to the features' dtype. It knows nothing of positives, which
would cost it a third of its registers: ``_positives_kernel`` overwrites those cells afterwards.

As in the statistics sweep the exponentials share a fixed shift, one for each element and matrix;
where a statistic lies too far from it (a flag on the device), a second launch takes one for each
direction instead. The launch that is not needed returns at once.
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

# statistics further from the shift than this take exponentials of their own
BELOW, ABOVE = tl.constexpr(55.0), tl.constexpr(82.0)


@triton.jit
def _coefficients_kernel(lse, weight, scale, out, flag, num_items, BLOCK: tl.constexpr):
    """``weight exp(shift - lse)``, the factor of exponentials that are relative to the shift."""
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = items < num_items
    shift = fixed_shift(tl.load(scale).to(tl.float32))
    a = tl.load(lse + items, mask=here, other=float("-inf"))
    w = tl.load(weight + items, mask=here, other=0.0)
    empty = a == float("-inf")
    odd = here & ((a < shift - BELOW) | (a > shift + ABOVE) | (a != a)) & (empty == 0)
    if tl.max(odd.to(tl.int32), 0) > 0:
        tl.atomic_max(flag, 1)
    tl.store(out + items, tl.where(empty, 0.0, w * tl.exp(shift - a)), mask=here)


@triton.jit
def _pull(x, items, lse, weight, AXIS: tl.constexpr):
    """``weight exp(x - lse)`` of a tile, by rows (AXIS 1) or columns (AXIS 0)."""
    a = tl.load(lse + items)
    w = tl.where(a == float("-inf"), 0.0, tl.load(weight + items))
    a = tl.where(a == float("-inf"), 0.0, a)
    return tl.exp2((x - tl.expand_dims(a, AXIS)) * LOG2E) * tl.expand_dims(w, AXIS)


@triton.jit
def _pulls(
    x,
    scale,
    rows,
    cols,
    row_lse,
    row_weight,
    row_coefficient,
    col_lse,
    col_weight,
    col_coefficient,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """What one matrix's rows and columns pull, of a tile of its logits."""
    if EXACT:
        if ROWS and COLS:
            return _pull(x, rows, row_lse, row_weight, 1) + _pull(x, cols, col_lse, col_weight, 0)
        elif ROWS:
            return _pull(x, rows, row_lse, row_weight, 1)
        else:
            return _pull(x, cols, col_lse, col_weight, 0)
    else:
        e = shifted_exp(x, fixed_shift(scale))
        if ROWS and COLS:
            a, b = tl.load(row_coefficient + rows), tl.load(col_coefficient + cols)
            return e * (a[:, None] + b[None, :])
        elif ROWS:
            return e * tl.load(row_coefficient + rows)[:, None]
        else:
            return e * tl.load(col_coefficient + cols)[None, :]


@triton.jit
def _gradient_kernel(
    query,
    key,
    scale,
    teacher_query,
    teacher_key,
    teacher_scale,
    row_lse,
    row_weight,
    row_coefficient,
    col_lse,
    col_weight,
    col_coefficient,
    teacher_row_lse,
    teacher_row_weight,
    teacher_row_coefficient,
    teacher_col_lse,
    teacher_col_weight,
    teacher_col_coefficient,
    residual,
    out,
    unit,
    flag,
    first_row,
    end_row,
    num_cols,
    num_tiles,
    out_stride,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """``out`` (end_row - first_row, num_cols) = [residual +] student's pulls - teacher's pulls."""
    if (tl.load(flag) != 0) != EXACT:
        return
    # a repetition has fewer programs than tiles; in any other launch this is no loop at all
    remaining = num_tiles - tl.program_id(0)
    for turn in (range if EXACT else tl.static_range)(
        tl.cdiv(remaining, tl.num_programs(0)) if EXACT else 1
    ):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        row_tile, col_tile = tile_numbers(
            tile, end_row - first_row, num_cols, BLOCK_ROWS, BLOCK_COLS, GROUP
        )
        row0, col0 = first_row + row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
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
        if ROWS or COLS:
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
        row_at, col_at = tl.minimum(rows, end_row - 1), tl.minimum(cols, num_cols - 1)
        g = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        if ROWS or COLS:
            g += _pulls(
                z,
                s,
                row_at,
                col_at,
                row_lse,
                row_weight,
                row_coefficient,
                col_lse,
                col_weight,
                col_coefficient,
                ROWS,
                COLS,
                EXACT,
            )
        if SOFT_ROWS or SOFT_COLS:
            g -= _pulls(
                t,
                r,
                row_at,
                col_at,
                teacher_row_lse,
                teacher_row_weight,
                teacher_row_coefficient,
                teacher_col_lse,
                teacher_col_weight,
                teacher_col_coefficient,
                SOFT_ROWS,
                SOFT_COLS,
                EXACT,
            )
        here = (rows < end_row)[:, None] & (cols < num_cols)[None, :]
        place = ((rows - first_row).to(tl.int64) * out_stride)[:, None] + cols[None, :]
        if RESIDUAL:
            g += tl.load(residual + place, mask=here, other=0.0)
        if UNIT:
            g *= tl.load(unit)
        tl.store(out + place, g.to(out.dtype.element_ty), mask=here)


@triton.jit
def _positives_kernel(
    out,
    unit,
    labels,
    logits,
    positive,
    other_labels,
    other_positive,
    other_lse,
    other_weight,
    teacher_logits,
    teacher_lse,
    teacher_weight,
    first_item,
    num_items,
    num_others,
    first_row,
    end_row,
    out_stride,
    OF_ROWS: tl.constexpr,
    OTHER: tl.constexpr,
    NUM_TEACHERS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the cells of a strip that are positives of its rows (OF_ROWS) or of its columns.

    ``positive`` is what the loss wants there; added to it is the pull of the other direction at
    this cell, or what the loss wants if it is the other direction's positive as well. Teachers'
    vectors: logits (K, num_items), lse and weight (K, num_others).
    """
    items = first_item + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = items < num_items
    others = tl.load(labels + items, mask=here, other=-1)
    inside = here & (others >= 0) & (others < num_others)
    others = tl.where(inside, others, 0)
    g = tl.load(positive + items, mask=inside, other=0.0)
    if OTHER:
        shared = tl.load(other_labels + others, mask=inside, other=-1) == items
        x = tl.load(logits + items, mask=inside, other=0.0)
        a = tl.load(other_lse + others, mask=inside, other=0.0)
        pull = tl.load(other_weight + others, mask=inside, other=0.0) * tl.exp(x - a)
        for k in range(NUM_TEACHERS):
            t = tl.load(teacher_logits + k * num_items + items, mask=inside, other=0.0)
            b = tl.load(teacher_lse + k * num_others + others, mask=inside, other=0.0)
            w = tl.load(teacher_weight + k * num_others + others, mask=inside, other=0.0)
            pull -= w * tl.exp(t - b)
        g += tl.where(shared, tl.load(other_positive + others, mask=inside, other=0.0), pull)
    if UNIT:
        g *= tl.load(unit)
    rows, cols = (items, others) if OF_ROWS else (others, items)
    inside = inside & (rows >= first_row) & (rows < end_row)
    place = (rows - first_row).to(tl.int64) * out_stride + cols
    tl.store(out + place, g.to(out.dtype.element_ty), mask=inside)
