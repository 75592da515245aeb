# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``similarity_rows``: statistics and gradients of a strip in one go.

Two kinds of strips of C rows and all columns:

* without a teacher the exponentials of ``similarity_attend.py``. The gradient of a logit is its
  exponential times a number of its row, which goes to the rows of the product with the keys, and
  of the one with the queries: no second pass over the strip. float16 has no room for exponentials.
* else float32 logits of both matrices, written by the statistics kernel. A second kernel makes the
  gradients of them, subtracts in float32 and rounds once.

Work: one product a matrix and one a feature that needs a gradient. Memory: the strips.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdengine_kernels.common import LOG2E, Matrix, strip_height
from kdengine_kernels.library import add_product, multiply, new_strip
from kdengine_kernels.similarity_attend import exponentials
from kdengine_kernels.similarity_sweep import Side, sweep
from kdengine_kernels.tuning import config

Weigh = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# gradients of logits are at most 1 before a mean over rows: what fills float16
GAIN = 4096.0


@triton.jit
def _softmax(logits, place, here, rows, row_here, lse, weight):
    """``weight exp(logits - lse)`` of a tile."""
    a = tl.load(lse + rows, mask=row_here, other=0.0)
    # minus infinity where there is nothing but a positive
    empty = a == float("-inf")
    w = tl.where(empty, 0.0, tl.load(weight + rows, mask=row_here, other=0.0))
    a = tl.where(empty, 0.0, a)
    x = tl.load(logits + place, mask=here, other=0.0)
    return tl.where(empty[:, None], 0.0, tl.exp2((x - a[:, None]) * LOG2E) * w[:, None])


@triton.jit
def _row_gradient_kernel(
    logits,
    teacher_logits,
    labels,
    lse,
    weight,
    positive,
    teacher_lse,
    teacher_weight,
    out,
    num_rows,
    num_cols,
    logits_stride,
    out_stride,
    SOFT: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """``out`` = FACTOR (student's softmax - teacher's); at a row's positive FACTOR ``positive``."""
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_here = rows < num_rows
    here = row_here[:, None] & (cols < num_cols)[None, :]
    place = (rows.to(tl.int64) * logits_stride)[:, None] + cols[None, :]
    g = _softmax(logits, place, here, rows, row_here, lse, weight)
    if SOFT:
        g -= _softmax(teacher_logits, place, here, rows, row_here, teacher_lse, teacher_weight)
    label = tl.load(labels + rows, mask=row_here, other=-1).to(tl.int32)
    wanted = tl.load(positive + rows, mask=row_here, other=0.0)
    g = tl.where(cols[None, :] == label[:, None], wanted[:, None], g) * FACTOR
    place = (rows.to(tl.int64) * out_stride)[:, None] + cols[None, :]
    tl.store(out + place, g.to(out.dtype.element_ty), mask=here)


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    weigh: Weigh,
    need_query: bool,
    need_key: bool,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """``G @ key`` and ``G.T @ query`` with G the gradient of the logits; see the other backend."""
    student = Matrix.of(query, key, scale)
    left = student.left.new_empty(
        len(query) if need_query else 0, student.left.shape[1], dtype=torch.float32
    )
    right = student.left.new_zeros(
        len(key) if need_key else 0, student.left.shape[1], dtype=torch.float32
    )
    teachers = zip(teacher_query, teacher_key, teacher_scale, strict=True)
    teacher = next((Matrix.of(u, v, r) for u, v, r in teachers), None)
    if teacher is None and student.left.dtype != torch.float16:
        _from_exponentials(student, labels.contiguous(), weigh, left, right, budget)
    else:
        _from_logits(student, teacher, labels.contiguous(), weigh, left, right, budget)
    # without the columns that fill a width up
    return left[:, : query.shape[1]].contiguous(), right[:, : key.shape[1]].contiguous()


def _from_exponentials(
    student: Matrix, labels: Tensor, weigh: Weigh, left: Tensor, right: Tensor, budget: int
) -> None:
    """Fill ``left`` and ``right`` where there is no teacher."""
    query, key, _ = student
    stats = query.new_empty(2, len(query), dtype=torch.float32)
    inside = (labels >= 0) & (labels < len(key))
    named = torch.where(inside, labels, 0)
    for part, strip, total in exponentials(student, labels, stats, budget):
        others, positive, _ = weigh(part, stats[:, part], stats.new_empty(4, 0))
        factor = (others / total)[:, None]
        if len(left):
            left[part] = multiply(strip, key) * factor
            left[part] += positive[:, None] * key[named[part]]
        if len(right):
            # what the row's factor makes the positive's weight
            cell = torch.where(others == 0, 0.0, positive / others) * total
            at = torch.arange(len(strip), device=strip.device), named[part]
            strip[at] = torch.where(inside[part], cell.to(strip.dtype), strip[at])
            add_product(right, strip.mT, (query[part] * factor).to(query.dtype))


def _from_logits(
    student: Matrix,
    teacher: Matrix | None,
    labels: Tensor,
    weigh: Weigh,
    left: Tensor,
    right: Tensor,
    budget: int,
) -> None:
    """Fill ``left`` and ``right`` by way of a strip of float32 logits a matrix."""
    query, key, scale = student
    num_rows, num_cols = len(query), len(key)
    # a tenth is enough for the partial sums
    row_bytes = query.itemsize + (4 if teacher is None else 8)
    height = strip_height(query, num_cols, row_bytes, budget * 9 // 10)
    g = new_strip(query, height, num_cols)
    z = new_strip(query, height, num_cols, torch.float32)
    t = z if teacher is None else new_strip(query, height, num_cols, torch.float32)
    factor = GAIN if query.dtype == torch.float16 else 1.0
    blocks = config("row_gradient", query.itemsize)
    nothing = Side(labels, None, None)
    for first in range(0, num_rows, height):
        part = slice(first, min(first + height, num_rows))
        rows = part.stop - first
        stats = z.new_empty(2, rows)
        own = student._replace(left=query[part])
        soft = z.new_empty(4, 0 if teacher is None else rows)
        side, theirs = Side(labels[part], stats, None), None
        if teacher is not None:
            side, theirs = side._replace(teacher=soft), teacher._replace(left=teacher.left[part])
        sweep(own, theirs, side, nothing, budget // 10, kept=(z, t))
        weights = [x.contiguous() for x in weigh(part, stats, soft)]
        grid = (triton.cdiv(num_cols, blocks.cols), triton.cdiv(rows, blocks.rows))
        _row_gradient_kernel[grid](
            z,
            t,
            labels[part],
            stats[0],
            *weights[:2],
            soft[0],
            weights[2],
            g,
            rows,
            num_cols,
            z.stride(0),
            g.stride(0),
            SOFT=teacher is not None,
            FACTOR=factor,
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLS=blocks.cols,
            num_warps=blocks.warps,
        )
        if len(left):
            left[part] = multiply(g[:rows], key)
        if len(right):
            add_product(right, g[:rows].mT, query[part])
    if factor != 1.0:
        left.div_(factor)
        right.div_(factor)
