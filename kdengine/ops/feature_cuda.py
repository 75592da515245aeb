# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``feature``: ``csrc/feature.h``, on GPUs and, in C++, on the CPU."""

import torch
from torch import Tensor

from kdengine.ops import extension
from kdengine.ops._backend import statistics_dtype


def forward(student: Tensor, teacher: Tensor, normalize: bool, unit: bool) -> tuple[Tensor, Tensor]:
    """Squared distance of each pair of rows, and unit rows; see ``kdengine.ops.feature``."""
    dtype = student.dtype
    student, teacher = _operands(student, teacher)
    distance = student.new_empty(len(student), dtype=statistics_dtype(student))
    units = student.new_empty(student.shape if unit else (0,))
    extension.call("feature_forward", student, teacher, distance, units, normalize)
    return distance, units.to(dtype)


def backward(
    grad: Tensor, grad_unit: Tensor | None, student: Tensor, teacher: Tensor, normalize: bool
) -> Tensor:
    """Gradient of student; ``grad_unit`` is that of its unit rows."""
    dtype = student.dtype
    student, teacher = _operands(student, teacher)
    # upstream gradients may be expanded scalars
    grad = grad.contiguous()
    more = student.new_empty(0) if grad_unit is None else grad_unit.to(student.dtype).contiguous()
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    extension.call("feature_backward", student, teacher, grad, more, out, normalize)
    return out.to(dtype)


def _operands(*tensors: Tensor) -> list[Tensor]:
    """With neighbouring elements in a row; all float64, if one is."""
    if statistics_dtype(*tensors) == torch.float64:
        tensors = tuple(x.double() for x in tensors)
    return [x if x.stride(1) == 1 else x.contiguous() for x in tensors]
