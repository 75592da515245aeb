# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``feature``: strips of rows, on any device."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdengine.ops._backend import statistics_dtype

STRIP_BYTES = 1 << 20
# as torch.nn.functional.normalize: shorter rows are divided by this
MIN_NORM = 1e-12


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], normalize: bool, unit: bool
) -> tuple[Tensor, list[Tensor]]:
    """Squared distance of each pair of rows, and unit rows; see ``kdengine.ops.feature``."""
    dtype = statistics_dtype(*students, *teachers)
    distances = students[0].new_empty((len(students), len(students[0])), dtype=dtype)
    units = [x.new_empty(x.shape) for x in students if unit]
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for rows in _strips(student, dtype):
            x, u = student[rows].to(dtype), teacher[rows].to(dtype)
            if normalize:
                x, u = x / _norm(x), u / _norm(u)
            if unit:
                units[i][rows] = x
            torch.sum((x - u).square_(), 1, out=distances[i, rows])
    return distances, units


def backward(
    grad: Tensor,
    grad_units: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the students; ``grad_units`` are those of their unit rows, or empty."""
    dtype = statistics_dtype(*students, *teachers)
    towers = zip(grad, grad_units, students, teachers, strict=True)
    return [_tower_backward(*tower, normalize, dtype) for tower in towers]


def _tower_backward(
    grad: Tensor,
    grad_unit: Tensor,
    student: Tensor,
    teacher: Tensor,
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    for rows in _strips(student, dtype):
        x, u = student[rows].to(dtype), teacher[rows].to(dtype)
        up = 2 * grad[rows, None]
        if not normalize:
            gradient[rows] = (x - u).mul_(up)
            continue
        norm = _norm(x)
        unit = x / norm
        pull = (unit - u / _norm(u)).mul_(up)
        if grad_unit.numel():
            pull += grad_unit[rows]
        # only the part across the row survives, unless its length was bounded
        radial = torch.where(norm > MIN_NORM, (unit * pull).sum(1, keepdim=True), 0)
        gradient[rows] = pull.sub_(unit * radial).div_(norm)
    return gradient


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=MIN_NORM)


def _strips(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    height = max(1, STRIP_BYTES // max(1, x.shape[1] * dtype.itemsize))
    for first in range(0, len(x), height):
        yield slice(first, first + height)
