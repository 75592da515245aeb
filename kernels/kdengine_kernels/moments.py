# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``moments``: mean and biased variance of columns, in one launch.

    mean_d = 1/B sum_i x_id,   variance_d = 1/B sum_i (x_id - mean_d)^2

A program takes a strip of columns of student or teacher and reads its rows twice, so few programs
run where the width is small. Backward, elementwise, with g and h the upstream gradients of the
student's moments:

    d student_id = (g_d + 2 h_d (x_id - mean_d)) / B
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS = 64, 16


@triton.jit
def _load(x, stride, rows, cols, num_rows, width):
    here = (rows < num_rows)[:, None] & (cols < width)[None, :]
    place = x + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(place, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _moments_of_columns(x, stride, out, num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        total += _load(x, stride, rows, cols, num_rows, width)
    mean = tl.sum(total, 0) / num_rows
    rest = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        apart = _load(x, stride, rows, cols, num_rows, width) - mean[None, :]
        apart = tl.where((rows < num_rows)[:, None], apart, 0.0)
        rest += apart
        squares += apart * apart
    # what the rounded mean left over
    rest_mean = tl.sum(rest, 0) / num_rows
    variance = tl.sum(squares, 0) / num_rows - rest_mean * rest_mean
    tl.store(out + cols, mean + rest_mean, mask=cols < width)
    # past the means of both sides
    tl.store(out + 2 * width + cols, tl.maximum(variance, 0.0), mask=cols < width)


@triton.jit
def _moments_kernel(sides, strides, out, num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    side = tl.program_id(1)
    for i in tl.static_range(2):
        if side == i:
            _moments_of_columns(sides[i], strides[i], out + i * width, num_rows, width, ROWS, COLS)


@triton.jit
def _moments_gradient_kernel(
    student,
    mean,
    grad,
    out,
    student_stride,
    grad_stride,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    center = tl.load(mean + cols, mask=inside, other=0.0)
    pull = tl.load(grad + cols, mask=inside, other=0.0)
    slope = tl.load(grad + grad_stride + cols, mask=inside, other=0.0)
    apart = _load(student, student_stride, rows, cols, num_rows, width) - center[None, :]
    g = (pull[None, :] + 2.0 * slope[None, :] * apart) / num_rows
    here = (rows < num_rows)[:, None] & inside[None, :]
    place = out + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(place, g.to(out.dtype.element_ty), mask=here)


def forward(student: Tensor, teacher: Tensor) -> Tensor:
    """Means and variances (2, 2, E) of student and teacher; see ``kdengine.ops.moments``."""
    sides = tuple(_rows(x) for x in (student, teacher))
    num_rows, width = student.shape
    out = student.new_empty((2, 2, width), dtype=torch.float32)
    _moments_kernel[(triton.cdiv(width, COLS), 2)](
        sides, tuple(x.stride(0) for x in sides), out, num_rows, width, ROWS=ROWS, COLS=COLS
    )
    return out


def backward(grad: Tensor, student: Tensor, mean: Tensor) -> Tensor:
    """Gradient of student, from those (2, E) of its mean and variance."""
    student, grad = _rows(student), _rows(grad)
    num_rows, width = student.shape
    out = student.new_empty(student.shape)
    _moments_gradient_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, 4 * COLS))](
        student,
        mean,
        grad,
        out,
        student.stride(0),
        grad.stride(0),
        num_rows,
        width,
        ROWS=ROWS,
        COLS=4 * COLS,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements in a row, as the kernels read it."""
    return x if x.stride(1) == 1 else x.contiguous()
