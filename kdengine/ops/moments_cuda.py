# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``moments``: ``csrc/moments.h``, on GPUs and, in C++, on the CPU.

Launches: one forward for up to ``CHUNK`` rows, two for more, one backward.
"""

import torch
from torch import Tensor

from kdengine.ops import extension
from kdengine.ops._backend import statistics_dtype
from kdengine.ops.feature_cuda import rows

# rows whose moments a block makes, as kChunk of csrc/moments.h
CHUNK = 256


def forward(student: Tensor, teacher: Tensor) -> Tensor:
    """Means and variances (2, 2, E) of student and teacher; see ``kdengine.ops.moments``."""
    real, width = statistics_dtype(student, teacher), student.shape[1]
    # a launch takes one dtype
    dtype = student.dtype if student.dtype == teacher.dtype else real
    sides = [rows(x.to(dtype)) for x in (student, teacher)]
    out = student.new_empty((4, width), dtype=real)
    chunks = -(-len(student) // CHUNK)
    parts = out.new_empty((4 * chunks, width) if chunks > 1 else (0,))
    extension.call("moments_forward", sides, parts, out)
    return out.view(2, 2, width)


def backward(grad: Tensor, student: Tensor, mean: Tensor) -> Tensor:
    """Gradient of student, from those (2, E) of its mean and variance."""
    x = rows(student.double() if mean.dtype == torch.float64 else student)
    out = x.new_empty(x.shape)
    extension.call("moments_backward", x, mean, grad.contiguous(), out)
    return out.to(student.dtype)
