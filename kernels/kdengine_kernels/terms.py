# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``terms``: a loss's terms of rows and columns in one launch each way.

Each program turns a block of statistics into losses and adds these up; the blocks' sums are added
in a fixed order, so that runs are equal. The backward is elementwise.

    hard_i = softplus(others - positive),     softplus(x) = log(1 + exp(x))
    soft_i = softplus(others - positive) - softplus(t_others - t_positive)
             + r (gap - t_positive + positive),   r = sigmoid(t_others - t_positive)

Without a positive ``hard`` is infinite, softplus stands for ``others`` alone, and r is 1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))`` with a small relative error, also where it is nearly 0."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 atanh(e / (2 + e)), of an argument up to 1/3
    a = e / (2.0 + e)
    q = a * a
    series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15))
    series = 1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series))
    return tl.maximum(x, 0.0) + 2.0 * a * (1.0 + q * (1.0 / 3 + q * series))


@triton.jit
def _sigmoid(x):
    """``1 / (1 + exp(-x))`` with a small relative error on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _losses(
    others,
    positive,
    teacher_others,
    teacher_positive,
    gap,
    teacher_mean,
    labels,
    items,
    num_items,
    limit,
    teacher_stride,
    NUM_TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block's sums of hard losses, and of divergences and entropies over all teachers."""
    here = items < num_items
    label = tl.load(labels + items, mask=here, other=-1)
    has = (label >= 0) & (label < limit)
    a = tl.load(others + items, mask=here, other=0.0)
    z = tl.load(positive + items, mask=here, other=0.0)
    miss = _softplus(a - z)
    hard = tl.where(has, miss, float("inf"))
    student = tl.where(has, miss, a)
    soft = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    for k in range(NUM_TEACHERS):
        at = k * teacher_stride + items
        b = tl.load(teacher_others + at, mask=here, other=0.0)
        t = tl.load(teacher_positive + at, mask=here, other=0.0)
        outside = tl.where(has, _sigmoid(b - t), 1.0)
        teacher = tl.where(has, _softplus(b - t), b)
        soft += student - teacher + outside * (tl.load(gap + at, mask=here, other=0.0) - t + z)
        entropy += teacher + outside * (t - tl.load(teacher_mean + at, mask=here, other=0.0))
    zero = tl.zeros((BLOCK,), tl.float32)
    return (
        tl.sum(tl.where(here, hard, zero), 0),
        tl.sum(tl.where(here, soft, zero), 0),
        tl.sum(tl.where(here, entropy, zero), 0),
    )


@triton.jit
def _terms_forward_kernel(
    others,
    positive,
    teacher_others,
    teacher_positive,
    gap,
    teacher_mean,
    labels,
    col_others,
    col_positive,
    col_teacher_others,
    col_teacher_positive,
    col_gap,
    col_teacher_mean,
    col_labels,
    parts,
    num_rows,
    num_cols,
    row_limit,
    col_limit,
    teacher_stride,
    col_teacher_stride,
    row_share,
    col_share,
    HARD_ROWS: tl.constexpr,
    HARD_COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts`` (terms and entropies that are on, programs) = each program's part of their means.

    SOFT_ROWS and SOFT_COLS are numbers of teachers.
    """
    num_parts = tl.num_programs(0)
    row_blocks = tl.cdiv(num_rows, BLOCK) if HARD_ROWS or SOFT_ROWS else 0
    block = tl.program_id(0)
    hard_rows, soft_rows, entropy_rows = 0.0, 0.0, 0.0
    hard_cols, soft_cols, entropy_cols = 0.0, 0.0, 0.0
    if block < row_blocks:
        if HARD_ROWS or SOFT_ROWS:
            hard_rows, soft_rows, entropy_rows = _losses(
                others,
                positive,
                teacher_others,
                teacher_positive,
                gap,
                teacher_mean,
                labels,
                block * BLOCK + tl.arange(0, BLOCK),
                num_rows,
                row_limit,
                teacher_stride,
                SOFT_ROWS,
                BLOCK,
            )
    else:
        if HARD_COLS or SOFT_COLS:
            hard_cols, soft_cols, entropy_cols = _losses(
                col_others,
                col_positive,
                col_teacher_others,
                col_teacher_positive,
                col_gap,
                col_teacher_mean,
                col_labels,
                (block - row_blocks) * BLOCK + tl.arange(0, BLOCK),
                num_cols,
                col_limit,
                col_teacher_stride,
                SOFT_COLS,
                BLOCK,
            )
    out = parts + block
    if HARD_ROWS:
        tl.store(out, hard_rows * row_share)
        out += num_parts
    if HARD_COLS:
        tl.store(out, hard_cols * col_share)
        out += num_parts
    if SOFT_ROWS:
        tl.store(out, soft_rows * (row_share / SOFT_ROWS))
        out += num_parts
    if SOFT_COLS:
        tl.store(out, soft_cols * (col_share / SOFT_COLS))
        out += num_parts
    if SOFT_ROWS:
        tl.store(out, entropy_rows * (row_share / SOFT_ROWS))
        out += num_parts
    if SOFT_COLS:
        tl.store(out, entropy_cols * (col_share / SOFT_COLS))


@triton.jit
def _wanted(
    hard,
    soft,
    others,
    positive,
    teacher_others,
    teacher_positive,
    labels,
    others_out,
    positive_out,
    gap_out,
    items,
    num_items,
    limit,
    teacher_stride,
    NUM_TEACHERS: tl.constexpr,
):
    """Gradients of a block's statistics; ``hard`` and ``soft`` are those of one loss."""
    here = items < num_items
    label = tl.load(labels + items, mask=here, other=-1)
    has = (label >= 0) & (label < limit)
    a = tl.load(others + items, mask=here, other=0.0)
    z = tl.load(positive + items, mask=here, other=0.0)
    miss = _sigmoid(a - z)
    pull = tl.where(has, hard * miss, 0.0)
    g_others, g_positive = pull, -pull
    for k in range(NUM_TEACHERS):
        at = k * teacher_stride + items
        b = tl.load(teacher_others + at, mask=here, other=0.0)
        t = tl.load(teacher_positive + at, mask=here, other=0.0)
        outside = tl.where(has, _sigmoid(b - t), 1.0)
        student = tl.where(has, miss, 1.0)
        g_others += soft * student
        g_positive += soft * tl.where(has, outside - student, outside)
        tl.store(gap_out + k * num_items + items, soft * outside, mask=here)
    tl.store(others_out + items, g_others, mask=here)
    tl.store(positive_out + items, g_positive, mask=here)


@triton.jit
def _terms_backward_kernel(
    grads,
    others,
    positive,
    teacher_others,
    teacher_positive,
    labels,
    others_out,
    positive_out,
    gap_out,
    col_others,
    col_positive,
    col_teacher_others,
    col_teacher_positive,
    col_labels,
    col_others_out,
    col_positive_out,
    col_gap_out,
    num_rows,
    num_cols,
    row_limit,
    col_limit,
    teacher_stride,
    col_teacher_stride,
    row_share,
    col_share,
    HARD_ROWS: tl.constexpr,
    HARD_COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the terms, with upstream gradients ``grads``, want of the statistics."""
    row_blocks = tl.cdiv(num_rows, BLOCK) if HARD_ROWS or SOFT_ROWS else 0
    block = tl.program_id(0)
    # terms that are off have no place among the upstream gradients
    hard_cols_at: tl.constexpr = 1 if HARD_ROWS else 0
    soft_rows_at: tl.constexpr = hard_cols_at + (1 if HARD_COLS else 0)
    soft_cols_at: tl.constexpr = soft_rows_at + (1 if SOFT_ROWS > 0 else 0)
    hard, soft = 0.0, 0.0
    if block < row_blocks:
        if HARD_ROWS:
            hard = tl.load(grads) * row_share
        if SOFT_ROWS:
            soft = tl.load(grads + soft_rows_at) * (row_share / SOFT_ROWS)
        if HARD_ROWS or SOFT_ROWS:
            _wanted(
                hard,
                soft,
                others,
                positive,
                teacher_others,
                teacher_positive,
                labels,
                others_out,
                positive_out,
                gap_out,
                block * BLOCK + tl.arange(0, BLOCK),
                num_rows,
                row_limit,
                teacher_stride,
                SOFT_ROWS,
            )
    else:
        if HARD_COLS:
            hard = tl.load(grads + hard_cols_at) * col_share
        if SOFT_COLS:
            soft = tl.load(grads + soft_cols_at) * (col_share / SOFT_COLS)
        if HARD_COLS or SOFT_COLS:
            _wanted(
                hard,
                soft,
                col_others,
                col_positive,
                col_teacher_others,
                col_teacher_positive,
                col_labels,
                col_others_out,
                col_positive_out,
                col_gap_out,
                (block - row_blocks) * BLOCK + tl.arange(0, BLOCK),
                num_cols,
                col_limit,
                col_teacher_stride,
                SOFT_COLS,
            )


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
    sides = [_side(x, own) for x, own in ((rows, labels), (cols, col_labels))]
    num_terms, num_programs = sum((*hard, *soft)), _num_programs(sides)
    parts = labels.new_empty(num_terms + sum(soft), num_programs, dtype=torch.float32)
    _terms_forward_kernel[(num_programs,)](
        *sides[0],
        *sides[1],
        parts,
        *_numbers(sides, limits, shares),
        **_flags(sides, hard, soft),
        BLOCK=BLOCK,
    )
    return parts[:num_terms].sum(1), parts[num_terms:].sum(1)


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
    sides = [_side(x, own) for x, own in ((rows, labels), (cols, col_labels))]
    found = [
        # the gap's is contiguous, whatever the statistics are
        side[i].new_empty(side[i].shape if x else 0)
        for side, x in zip(sides, (rows, cols), strict=True)
        for i in (0, 1, 4)
    ]
    row_inputs, col_inputs = ((*side[:4], side[6]) for side in sides)
    _terms_backward_kernel[(_num_programs(sides),)](
        grads.contiguous(),
        *row_inputs,
        *found[:3],
        *col_inputs,
        *found[3:],
        *_numbers(sides, limits, shares),
        **_flags(sides, hard, soft),
        BLOCK=BLOCK,
    )
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _side(statistics: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """Others, positive, the teachers' four of one stride, and labels; empty where a side is off."""
    if not statistics:
        nothing = labels.new_empty(0, dtype=torch.float32)
        return [nothing] * 2 + [nothing.new_empty(0, 0)] * 4 + [labels[:0]]
    student = [x.contiguous() for x in statistics[:2]]
    teachers = list(statistics[2:])
    if len({x.stride() for x in teachers}) > 1 or teachers[0].stride(1) != 1:
        teachers = [x.contiguous() for x in teachers]
    return [*student, *teachers, labels.contiguous()]


def _num_programs(sides: Sequence[Sequence[Tensor]]) -> int:
    return sum(triton.cdiv(len(side[0]), BLOCK) for side in sides)


def _numbers(
    sides: Sequence[Sequence[Tensor]], limits: Sequence[int], shares: Sequence[float]
) -> list[float]:
    """Sizes, label limits, strides between teachers, and weights of one loss in a mean."""
    sizes = [len(side[0]) for side in sides]
    weights = [share / max(1, size) for share, size in zip(shares, sizes, strict=True)]
    return [*sizes, *limits, *(side[2].stride(0) for side in sides), *weights]


def _flags(
    sides: Sequence[Sequence[Tensor]], hard: Sequence[bool], soft: Sequence[bool]
) -> dict[str, bool | int]:
    counts = [len(side[2]) * on for side, on in zip(sides, soft, strict=True)]
    return {
        "HARD_ROWS": hard[0],
        "HARD_COLS": hard[1],
        "SOFT_ROWS": counts[0],
        "SOFT_COLS": counts[1],
    }
