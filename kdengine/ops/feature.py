# SPDX-License-Identifier: Apache-2.0
"""The op ``feature``: squared distance of student and teacher rows, normalised on the way.

    distance_i = ||x_i - u_i||^2, of x = student / ||student|| and u likewise with ``normalize``

``unit_feature`` also gives x to the losses that take unit rows. Its backward adds what all of them
want of x to what the distance wants and goes through the normalisation once:

    d student_i = (p - x (x . p)) / ||student_i||,   p = 2 g_i (x - u) + d x_i

Memory: O(B), and x; the backward reads both inputs again. One pass over memory each way.
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
    return _forward(student, teacher, normalize, False, backend)[0]


def unit_feature(
    student: Tensor, teacher: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Squared distance of each pair of normalised rows, and the student's normalised rows.

    Shapes: student, teacher (B, E).
    Returns: (B,) as ``feature``, and (B, E) in the student's dtype, from which the distance is not
    computed: it sees unrounded rows.
    Gradients, raises: as ``feature``, whatever is done with the two.
    """
    _backend.check_name("feature", backend)
    return _forward(student, teacher, True, True, backend)


@torch.library.custom_op("kdengine::feature_forward", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, normalize: bool, unit: bool, backend: str
) -> tuple[Tensor, Tensor]:
    module = _backend.choose("feature", [student, teacher], backend)
    with _backend.running(student):
        return module.forward(student, teacher, normalize, unit)


@_forward.register_fake
def _forward_fake(
    student: Tensor, teacher: Tensor, normalize: bool, unit: bool, backend: str
) -> tuple[Tensor, Tensor]:
    distance = student.new_empty(
        student.shape[0], dtype=_backend.statistics_dtype(student, teacher)
    )
    return distance, student.new_empty(student.shape if unit else (0,))


@torch.library.custom_op("kdengine::feature_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_unit: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    normalize: bool,
    backend: str,
) -> Tensor:
    module = _backend.choose("feature", [student, teacher], backend)
    with _backend.running(student):
        return module.backward(grad, grad_unit, student, teacher, normalize)


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    grad_unit: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    normalize: bool,
    backend: str,
) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.normalize, ctx.unit, ctx.backend = inputs
    ctx.save_for_backward(student, teacher)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_unit: Tensor | None) -> tuple:
    _backend.refuse_create_graph("feature")
    student, teacher = ctx.saved_tensors
    if grad is None:
        dtype = _backend.statistics_dtype(student, teacher)
        grad = student.new_zeros(len(student), dtype=dtype)
    pull = grad_unit if ctx.unit else None
    found = _backward(grad, pull, student, teacher, ctx.normalize, ctx.backend)
    return found, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
