# SPDX-License-Identifier: Apache-2.0
"""The end of a statistics sweep, in one launch: partial sums to log-sum-exps, positives, the flag.

``similarity_statistics.py`` leaves partial sums of a strip's rows, one for each tile of columns,
and of all columns, one for each tile of rows. Each program here adds up those of a block of rows or
of columns in a fixed order, of student and teacher, and looks up the logits of the positives. A
total that may have lost terms raises the flag on the device, for which the sweep, and this, are
repeated.
"""

import triton
import triton.language as tl

from kdengine_kernels.common import LOG2E, fixed_shift
from kdengine_kernels.similarity_statistics import LOWEST

# totals outside this range are summed again, relative to their largest terms
SMALLEST, LARGEST = tl.constexpr(2.0**-80), tl.constexpr(1e36)


@triton.jit
def _combine(
    parts,
    running,
    out,
    scale,
    flag,
    items,
    here,
    num_parts,
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
    """Add up partial sums of one matrix; with LAST turn them into log-sum-exp and weighted means.

    Without FIRST they are added to ``running``, without LAST they go there.
    """
    own = running + items
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
            top += fixed_shift(tl.load(scale).to(tl.float32))
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
def _positive(
    left,
    right,
    scale,
    labels,
    out,
    first,
    items,
    here,
    limit,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logit that each item's label names; 0 where the label is outside the matrix.

    ``items`` count from row ``first`` of ``left`` on.
    """
    label = tl.load(labels + first + items, mask=here, other=-1)
    inside = here & (label >= 0) & (label < limit)
    k = tl.arange(0, BLOCK_K)
    left_at = left + (first + items).to(tl.int64)[:, None] * WIDTH + k[None, :]
    right_at = right + tl.where(inside, label, 0).to(tl.int64)[:, None] * WIDTH + k[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        mask = inside[:, None] & (start + k < WIDTH)[None, :]
        a = tl.load(left_at + start, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(right_at + start, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    tl.store(out + items, total * tl.load(scale).to(tl.float32), mask=here)


@triton.jit
def _finish(
    sums,
    matrix,
    labels,
    flag,
    first,
    block,
    num_items,
    num_parts,
    limit,
    strides,
    WIDTH: tl.constexpr,
    NUM_WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ONLINE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What one program does for one matrix: sums, and with LAST the positives, of a block."""
    parts, running, out = sums
    left, right, scale = matrix
    slot_stride, part_stride, running_stride, out_stride = strides
    items = block * BLOCK + tl.arange(0, BLOCK)
    here = items < num_items
    _combine(
        parts,
        running,
        out,
        scale,
        flag,
        items,
        here,
        num_parts,
        slot_stride,
        part_stride,
        running_stride,
        out_stride,
        NUM_WEIGHTED,
        FIRST,
        LAST,
        ONLINE,
        BLOCK_PARTS,
        BLOCK,
    )
    if LAST and not ONLINE:
        at = out + out_stride
        _positive(left, right, scale, labels, at, first, items, here, limit, WIDTH, BLOCK, BLOCK_K)


@triton.jit
def _finalise_kernel(
    row_parts,
    col_parts,
    running,
    row_out,
    col_out,
    teacher_row_out,
    teacher_col_out,
    left,
    right,
    scale,
    teacher_left,
    teacher_right,
    teacher_scale,
    labels,
    col_labels,
    flag,
    first_row,
    num_rows,
    all_rows,
    num_cols,
    num_row_parts,
    num_col_parts,
    row_stride,
    row_slot,
    col_stride,
    col_slot,
    row_out_stride,
    col_out_stride,
    teacher_row_out_stride,
    teacher_col_out_stride,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    MEANS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ONLINE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The end of a strip's sweep: statistics of its rows, and of the columns when it is the LAST.

    Programs of the rows come first, then those of the columns; each does student and teacher. The
    outputs begin at the strip's first row. Raises the flag where a sum lost terms.
    """
    if ONLINE:
        if tl.load(flag) == 0:
            return
    row_blocks = tl.cdiv(num_rows, BLOCK) if ROWS or SOFT_ROWS else 0
    block = tl.program_id(0)
    if block < row_blocks:
        if ROWS:
            _finish(
                (row_parts, running, row_out),
                (left, right, scale),
                labels,
                flag,
                first_row,
                block,
                num_rows,
                num_row_parts,
                num_cols,
                (row_slot, row_stride, 0, row_out_stride),
                WIDTH,
                MEANS,
                True,
                True,
                ONLINE,
                BLOCK_PARTS,
                BLOCK,
                BLOCK_K,
            )
        if SOFT_ROWS:
            parts = row_parts + ((2 + MEANS) * row_slot if ROWS else 0)
            _finish(
                (parts, running, teacher_row_out),
                (teacher_left, teacher_right, teacher_scale),
                labels,
                flag,
                first_row,
                block,
                num_rows,
                num_row_parts,
                num_cols,
                (row_slot, row_stride, 0, teacher_row_out_stride),
                TEACHER_WIDTH,
                2,
                True,
                True,
                ONLINE,
                BLOCK_PARTS,
                BLOCK,
                BLOCK_K,
            )
    else:
        block -= row_blocks
        if COLS:
            _finish(
                (col_parts, running, col_out),
                (right, left, scale),
                col_labels,
                flag,
                0,
                block,
                num_cols,
                num_col_parts,
                all_rows,
                (col_slot, col_stride, num_cols, col_out_stride),
                WIDTH,
                MEANS,
                FIRST,
                LAST,
                ONLINE,
                BLOCK_PARTS,
                BLOCK,
                BLOCK_K,
            )
        if SOFT_COLS:
            parts = col_parts + ((2 + MEANS) * col_slot if COLS else 0)
            own = running + ((2 + MEANS) * num_cols if COLS else 0)
            _finish(
                (parts, own, teacher_col_out),
                (teacher_right, teacher_left, teacher_scale),
                col_labels,
                flag,
                0,
                block,
                num_cols,
                num_col_parts,
                all_rows,
                (col_slot, col_stride, num_cols, teacher_col_out_stride),
                TEACHER_WIDTH,
                2,
                FIRST,
                LAST,
                ONLINE,
                BLOCK_PARTS,
                BLOCK,
                BLOCK_K,
            )


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
    _positive(left, right, scale, labels, out, 0, items, here, limit, WIDTH, BLOCK, BLOCK_K)
