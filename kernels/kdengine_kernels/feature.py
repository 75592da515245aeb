# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``feature``: one program a row, all towers in one launch.

    distance_i = ||x_i - u_i||^2,   x = student / max(||student||, 1e-12), u likewise

Backward, with g the upstream gradient of distance_i, d x_i that of the unit rows where these were
asked for, and p = 2 g (x - u) + d x_i:

    d student_i = (p - x (x . p)) / ||student_i||

One pass over memory each way. Bytes of a tower: forward ``B E (student + teacher)`` and the unit
rows once, backward the same and the gradient once.
"""

from collections.abc import Sequence

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
def _forward_row(
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
def _backward_row(
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


# a program a row and tower; what differs between towers comes in tuples
@triton.jit
def _feature_forward_kernel(
    students,
    teachers,
    distance,
    units,
    student_strides,
    teacher_strides,
    width,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tower = tl.program_id(1)
    for i in tl.static_range(len(students)):
        if tower == i:
            _forward_row(
                students[i],
                teachers[i],
                distance + i * tl.num_programs(0),
                units[i],
                student_strides[i],
                teacher_strides[i],
                width,
                NORMALIZE,
                UNIT,
                BLOCK,
            )


@triton.jit
def _feature_backward_kernel(
    grad,
    grad_units,
    students,
    teachers,
    outs,
    unit_strides,
    student_strides,
    teacher_strides,
    width,
    NORMALIZE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tower = tl.program_id(1)
    for i in tl.static_range(len(students)):
        if tower == i:
            _backward_row(
                grad + i * tl.num_programs(0),
                grad_units[i],
                students[i],
                teachers[i],
                outs[i],
                unit_strides[i],
                student_strides[i],
                teacher_strides[i],
                width,
                NORMALIZE,
                UNITS[i],
                BLOCK,
            )


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], normalize: bool, unit: bool
) -> tuple[Tensor, list[Tensor]]:
    """Squared distance of each pair of rows, and unit rows; see ``kdengine.ops.feature``."""
    ours, theirs = ([_rows(x) for x in one] for one in (students, teachers))
    num_rows, width = ours[0].shape
    distances = ours[0].new_empty((len(ours), num_rows), dtype=torch.float32)
    units = [x.new_empty(x.shape if unit else (0,)) for x in ours]
    block, warps = _launch_size(width)
    _feature_forward_kernel[(num_rows, len(ours))](
        tuple(ours),
        tuple(theirs),
        distances,
        tuple(units),
        _strides(ours),
        _strides(theirs),
        width,
        NORMALIZE=normalize,
        UNIT=unit,
        BLOCK=block,
        num_warps=warps,
    )
    return distances, units if unit else []


def backward(
    grad: Tensor,
    grad_units: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the students; ``grad_units`` are those of their unit rows, or empty."""
    ours, theirs = ([_rows(x) for x in one] for one in (students, teachers))
    pulls = [_rows(x) if x.numel() else y for x, y in zip(grad_units, ours, strict=True)]
    outs = [x.new_empty(x.shape) for x in ours]
    num_rows, width = ours[0].shape
    block, warps = _launch_size(width)
    _feature_backward_kernel[(num_rows, len(ours))](
        # an upstream gradient may be an expanded scalar
        grad.contiguous(),
        tuple(pulls),
        tuple(ours),
        tuple(theirs),
        tuple(outs),
        _strides(pulls),
        _strides(ours),
        _strides(theirs),
        width,
        NORMALIZE=normalize,
        UNITS=tuple(x.numel() > 0 for x in grad_units),
        BLOCK=block,
        num_warps=warps,
    )
    return outs


def _strides(xs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in xs)


def _rows(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements in a row, as the kernels read it."""
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_size(width: int) -> tuple[int, int]:
    """Elements of a program and its warps.

    Raises:
        RuntimeError: a row that one program cannot hold.
    """
    if width > MAX_WIDTH:
        raise RuntimeError(
            f"feature: backend triton holds rows of up to {MAX_WIDTH} elements; {width} came; "
            "use backend='torch'"
        )
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
