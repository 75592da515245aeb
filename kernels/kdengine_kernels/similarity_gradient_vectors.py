# SPDX-License-Identifier: Apache-2.0
"""Kernels around the strips of ``similarity_gradient.py``: coefficients before, positives after.

Both work on vectors, of rows and of columns in one launch. ``_positives_kernel`` overwrites the
cells of a strip that are positives, in the same arithmetic as the strip.
"""

import triton
import triton.language as tl

from kdengine_kernels.common import fixed_shift

# statistics further from the shift than this take exponentials of their own
BELOW, ABOVE = tl.constexpr(55.0), tl.constexpr(82.0)


@triton.jit
def _coefficients(lse, weight, scale, out, flag, block, num_items, BLOCK: tl.constexpr):
    """``weight exp(shift - lse)`` of a block; raises the flag where that leaves float32's range."""
    items = block * BLOCK + tl.arange(0, BLOCK)
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
def _coefficients_kernel(
    scale,
    teacher_scale,
    row_lse,
    row_weight,
    row_out,
    col_lse,
    col_weight,
    col_out,
    teacher_row_lse,
    teacher_row_weight,
    teacher_row_out,
    teacher_col_lse,
    teacher_col_weight,
    teacher_col_out,
    flag,
    num_rows,
    num_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Factors of exponentials that are relative to the shift, of two matrices' rows and columns."""
    block = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK)
    if block < row_blocks:
        if ROWS:
            _coefficients(row_lse, row_weight, scale, row_out, flag, block, num_rows, BLOCK)
        if SOFT_ROWS:
            _coefficients(
                teacher_row_lse,
                teacher_row_weight,
                teacher_scale,
                teacher_row_out,
                flag,
                block,
                num_rows,
                BLOCK,
            )
    else:
        block -= row_blocks
        if COLS:
            _coefficients(col_lse, col_weight, scale, col_out, flag, block, num_cols, BLOCK)
        if SOFT_COLS:
            _coefficients(
                teacher_col_lse,
                teacher_col_weight,
                teacher_scale,
                teacher_col_out,
                flag,
                block,
                num_cols,
                BLOCK,
            )


@triton.jit
def _fix(
    out,
    unit,
    mine,
    other,
    teachers,
    items,
    end_item,
    num_items,
    num_others,
    first_row,
    end_row,
    out_stride,
    OF_ROWS: tl.constexpr,
    OTHER: tl.constexpr,
    NUM_TEACHERS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Overwrite the cells of a strip that are positives of its rows (OF_ROWS) or of its columns.

    What the loss wants there, plus the pull of the other direction at this cell, or what the loss
    wants if it is the other direction's positive as well. ``mine`` and ``other`` are labels,
    logits, positive, lse and weight; the teachers' are logits (K, num_items), lse and weight (K,
    num_others).
    """
    labels, logits, positive, _, _ = mine
    other_labels, _, other_positive, other_lse, other_weight = other
    teacher_logits, teacher_lse, teacher_weight = teachers
    here = items < end_item
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


@triton.jit
def _positives_kernel(
    out,
    unit,
    row_labels,
    row_logits,
    row_positive,
    row_lse,
    row_weight,
    col_labels,
    col_logits,
    col_positive,
    col_lse,
    col_weight,
    row_teacher_logits,
    row_teacher_lse,
    row_teacher_weight,
    col_teacher_logits,
    col_teacher_lse,
    col_teacher_weight,
    num_rows,
    num_cols,
    first_row,
    end_row,
    out_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW_TEACHERS: tl.constexpr,
    COL_TEACHERS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite all positives of a strip. A cell of both directions gets the same from either."""
    row = (row_labels, row_logits, row_positive, row_lse, row_weight)
    col = (col_labels, col_logits, col_positive, col_lse, col_weight)
    block = tl.program_id(0)
    row_blocks = tl.cdiv(end_row - first_row, BLOCK) if ROWS else 0
    if block < row_blocks:
        if ROWS:
            _fix(
                out,
                unit,
                row,
                col,
                (row_teacher_logits, row_teacher_lse, row_teacher_weight),
                first_row + block * BLOCK + tl.arange(0, BLOCK),
                end_row,
                num_rows,
                num_cols,
                first_row,
                end_row,
                out_stride,
                True,
                COLS,
                ROW_TEACHERS,
                UNIT,
            )
    else:
        if COLS:
            # all columns may have a positive in the strip
            _fix(
                out,
                unit,
                col,
                row,
                (col_teacher_logits, col_teacher_lse, col_teacher_weight),
                (block - row_blocks) * BLOCK + tl.arange(0, BLOCK),
                num_cols,
                num_cols,
                num_rows,
                first_row,
                end_row,
                out_stride,
                False,
                ROWS,
                COL_TEACHERS,
                UNIT,
            )
