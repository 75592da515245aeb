# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``feature``: one program a row, one pass over memory each way.

    distance_i = ||x_i - u_i||^2,   x = student / max(||student||, 1e-12), u likewise

Backward, with g the upstream gradient of distance_i, d x_i that of the unit rows where these were
asked for, and p = 2 g (x - u) + d x_i:

    d student_i = (p - x (x . p)) / ||student_i||

Bytes: forward ``B E (student + teacher)`` and the unit rows once, backward the same and the
gradient once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# as torch.nn.functional.normalize: shorter rows are divided by this
MIN_NORM = tl.constexpr(1e-12)
MAX_WIDTH = 1 << 16


@triton.jit
def _load_row(x, row, stride, cols, here):
    return tl.load(x + row.to(tl.int64) * stride + cols, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _feature_forward_kernel(
    student,
    teacher,
    distance,
    unit,
    student_stride,
    teacher_stride,
    width,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    here = cols < width
    x = _load_row(student, row, student_stride, cols, here)
    u = _load_row(teacher, row, teacher_stride, cols, here)
    if NORMALIZE:
        x /= tl.maximum(tl.sqrt(tl.sum(x * x, 0)), MIN_NORM)
        u /= tl.maximum(tl.sqrt(tl.sum(u * u, 0)), MIN_NORM)
    if UNIT:
        place = unit + row.to(tl.int64) * width + cols
        tl.store(place, x.to(unit.dtype.element_ty), mask=here)
    tl.store(distance + row, tl.sum((x - u) * (x - u), 0))


@triton.jit
def _feature_backward_kernel(
    grad,
    grad_unit,
    student,
    teacher,
    out,
    unit_stride,
    student_stride,
    teacher_stride,
    width,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    here = cols < width
    x = _load_row(student, row, student_stride, cols, here)
    u = _load_row(teacher, row, teacher_stride, cols, here)
    up = 2.0 * tl.load(grad + row).to(tl.float32)
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(x * x, 0))
        bounded = tl.maximum(norm, MIN_NORM)
        x /= bounded
        u /= tl.maximum(tl.sqrt(tl.sum(u * u, 0)), MIN_NORM)
        pull = up * (x - u)
        if UNIT:
            pull += _load_row(grad_unit, row, unit_stride, cols, here)
        # only the part across the row survives, unless its length was bounded
        radial = tl.where(norm > MIN_NORM, tl.sum(x * pull, 0), 0.0)
        g = (pull - radial * x) / bounded
    else:
        g = up * (x - u)
    tl.store(out + row.to(tl.int64) * width + cols, g.to(out.dtype.element_ty), mask=here)


def forward(student: Tensor, teacher: Tensor, normalize: bool, unit: bool) -> tuple[Tensor, Tensor]:
    """Squared distance of each pair of rows, and unit rows; see ``kdengine.ops.feature``."""
    student, teacher = _rows(student), _rows(teacher)
    distance = student.new_empty(len(student), dtype=torch.float32)
    units = student.new_empty(student.shape if unit else (0,))
    block, warps = _launch_size(student)
    _feature_forward_kernel[(len(student),)](
        student,
        teacher,
        distance,
        units,
        student.stride(0),
        teacher.stride(0),
        student.shape[1],
        NORMALIZE=normalize,
        UNIT=unit,
        BLOCK=block,
        num_warps=warps,
    )
    return distance, units


def backward(
    grad: Tensor, grad_unit: Tensor | None, student: Tensor, teacher: Tensor, normalize: bool
) -> Tensor:
    """Gradient of student; ``grad_unit`` is that of its unit rows."""
    student, teacher = _rows(student), _rows(teacher)
    pulls = student if grad_unit is None else _rows(grad_unit)
    out = student.new_empty(student.shape)
    block, warps = _launch_size(student)
    _feature_backward_kernel[(len(student),)](
        # an upstream gradient may be an expanded scalar
        grad.contiguous(),
        pulls,
        student,
        teacher,
        out,
        pulls.stride(0),
        student.stride(0),
        teacher.stride(0),
        student.shape[1],
        NORMALIZE=normalize,
        UNIT=grad_unit is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements in a row, as the kernels read it."""
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_size(x: Tensor) -> tuple[int, int]:
    """Elements of a program and its warps.

    Raises:
        RuntimeError: a row that one program cannot hold.
    """
    width = x.shape[1]
    if width > MAX_WIDTH:
        raise RuntimeError(
            f"feature: backend triton holds rows of up to {MAX_WIDTH} elements; {width} came; "
            "use backend='torch'"
        )
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
