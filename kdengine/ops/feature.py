# SPDX-License-Identifier: Apache-2.0
"""The op ``feature``: squared distance of student and teacher rows, normalised on the way.

    distance_i = ||x_i - u_i||^2, of x = student / ||student|| and u likewise with ``normalize``

Memory: O(B); the backward reads both inputs again. One pass over memory each way.
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend


def feature(
    student: Tensor, teacher: Tensor, *, normalize: bool = False, backend: str = "auto"
) -> Tensor:
    """Squared distance of each pair of rows.

    Shapes: student, teacher (B, E).
    Returns: (B,); float64 if an input is, else float32. Rows shorter than 1e-12 are divided by
    that, as in ``torch.nn.functional.normalize``.
    Gradients: student, in its dtype; first order only. The teacher is a constant.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("feature", backend)
    return _forward(student, teacher, normalize, backend)


@torch.library.custom_op("kdengine::feature_forward", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, normalize: bool, backend: str) -> Tensor:
    module = _backend.choose("feature", [student, teacher], backend)
    with _backend.running(student):
        return module.forward(student, teacher, normalize)


@_forward.register_fake
def _forward_fake(student: Tensor, teacher: Tensor, normalize: bool, backend: str) -> Tensor:
    return student.new_empty(student.shape[0], dtype=_backend.statistics_dtype(student, teacher))


@torch.library.custom_op("kdengine::feature_backward", mutates_args=())
def _backward(
    grad: Tensor, student: Tensor, teacher: Tensor, normalize: bool, backend: str
) -> Tensor:
    module = _backend.choose("feature", [student, teacher], backend)
    with _backend.running(student):
        return module.backward(grad, student, teacher, normalize)


@_backward.register_fake
def _backward_fake(
    grad: Tensor, student: Tensor, teacher: Tensor, normalize: bool, backend: str
) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    student, teacher, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(student, teacher)


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    _backend.refuse_create_graph("feature")
    student, teacher = ctx.saved_tensors
    return _backward(grad, student, teacher, ctx.normalize, ctx.backend), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
