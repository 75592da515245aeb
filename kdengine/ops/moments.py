# SPDX-License-Identifier: Apache-2.0
"""The op ``moments``: mean and biased variance of each column, of student and teacher.

    mean_d = 1/B sum_i x_id,   variance_d = 1/B sum_i (x_id - mean_d)^2

With g and h the upstream gradients of the student's mean and variance:

    d student_id = (g_d + 2 h_d (x_id - mean_d)) / B

The variance is summed about the mean, not as a difference of large numbers. Sums have a fixed
order, so two runs give the same bits. Memory: O(E) beside results (``torch``: O(B E)).
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend


def moments(student: Tensor, teacher: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance over rows, of each column of student and teacher.

    Shapes: student, teacher (B, E), at least one row.
    Returns: means and variances, (2, E) each, the student's first; float64 if an input is, else
    float32.
    Gradients: student, in its dtype; first order only. The teacher is a constant.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("moments", backend)
    mean, variance = _forward(student, teacher, backend).unbind()
    return mean, variance


@torch.library.custom_op("kdengine::moments_forward", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    module = _backend.choose("moments", [student, teacher], backend)
    with _backend.running(student):
        return module.forward(student, teacher)


@_forward.register_fake
def _forward_fake(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    dtype = _backend.statistics_dtype(student, teacher)
    return student.new_empty((2, 2, student.shape[1]), dtype=dtype)


@torch.library.custom_op("kdengine::moments_backward", mutates_args=())
def _backward(grad: Tensor, student: Tensor, mean: Tensor, backend: str) -> Tensor:
    module = _backend.choose("moments", [student, mean], backend)
    with _backend.running(student):
        return module.backward(grad, student, mean)


@_backward.register_fake
def _backward_fake(grad: Tensor, student: Tensor, mean: Tensor, backend: str) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    student, _, ctx.backend = inputs
    ctx.save_for_backward(student, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    _backend.refuse_create_graph("moments")
    student, found = ctx.saved_tensors
    return _backward(grad[:, 0], student, found[0, 0], ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
