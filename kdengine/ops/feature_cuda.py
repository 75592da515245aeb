# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``feature``: ``csrc/feature.h``, on GPUs and, in C++, on the CPU."""

import torch
from torch import Tensor

from kdengine.ops import extension
from kdengine.ops._backend import statistics_dtype


def forward(student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    """Squared distance of each pair of rows; see ``kdengine.ops.feature``."""
    student, teacher = _operands(student, teacher)
    distance = student.new_empty(len(student), dtype=statistics_dtype(student))
    extension.call("feature_forward", student, teacher, distance, normalize)
    return distance


def backward(grad: Tensor, student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    """Gradient of student."""
    dtype = student.dtype
    student, teacher = _operands(student, teacher)
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    # an upstream gradient may be an expanded scalar
    extension.call("feature_backward", grad.contiguous(), student, teacher, out, normalize)
    return out.to(dtype)


def _operands(*tensors: Tensor) -> list[Tensor]:
    """With neighbouring elements in a row; all float64, if one is."""
    if statistics_dtype(*tensors) == torch.float64:
        tensors = tuple(x.double() for x in tensors)
    return [x if x.stride(1) == 1 else x.contiguous() for x in tensors]
