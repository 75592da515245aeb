# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``moments``, on any device."""

import torch
from torch import Tensor

from kdengine.ops._backend import statistics_dtype


def forward(student: Tensor, teacher: Tensor) -> Tensor:
    """Means and variances (2, 2, E) of student and teacher; see ``kdengine.ops.moments``."""
    dtype = statistics_dtype(student, teacher)
    both = torch.stack([student.to(dtype), teacher.to(dtype)])
    mean = both.mean(1)
    return torch.stack([mean, (both - mean[:, None]).square_().mean(1)])


def backward(grad: Tensor, student: Tensor, mean: Tensor) -> Tensor:
    """Gradient of student, from those (2, E) of its mean and variance."""
    apart = student.to(mean.dtype) - mean
    return ((grad[0] + 2 * grad[1] * apart) / len(student)).to(student.dtype)
