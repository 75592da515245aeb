# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``feature``: ``csrc/feature.h``, on GPUs and, in C++, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdengine.ops import extension
from kdengine.ops._backend import statistics_dtype


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], normalize: bool, unit: bool
) -> tuple[Tensor, list[Tensor]]:
    """Squared distance of each pair of rows, and unit rows; see ``kdengine.ops.feature``."""
    ours, theirs = _operands(students, teachers)
    distances = ours[0].new_empty((len(ours), len(ours[0])), dtype=statistics_dtype(*ours))
    units = [x.new_empty(x.shape if unit else (0,)) for x in ours]
    extension.call("feature_forward", ours, theirs, distances, units, normalize)
    return distances, [y.to(x.dtype) for x, y in zip(students, units, strict=True) if unit]


def backward(
    grad: Tensor,
    grad_units: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the students; ``grad_units`` are those of their unit rows, or empty."""
    ours, theirs = _operands(students, teachers)
    pulls = [x.to(ours[0].dtype).contiguous() for x in grad_units]
    outs = [x.new_empty(x.shape) for x in ours]
    # upstream gradients may be expanded scalars
    grad = grad.contiguous()
    extension.call("feature_backward", ours, theirs, grad, pulls, outs, normalize)
    return [y.to(x.dtype) for x, y in zip(students, outs, strict=True)]


def _operands(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """With neighbouring elements in a row; of one dtype a list, all float64 if one is."""
    found = []
    is_double = statistics_dtype(*(x for one in lists for x in one)) == torch.float64
    for one in lists:
        dtype = one[0].dtype if len({x.dtype for x in one}) == 1 else torch.float32
        dtype = torch.float64 if is_double else dtype
        found.append([rows(x.to(dtype)) for x in one])
    return found


def rows(x: Tensor) -> Tensor:
    """The matrix with neighbouring elements in a row."""
    return x if x.stride(1) == 1 else x.contiguous()
