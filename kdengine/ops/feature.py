# SPDX-License-Identifier: Apache-2.0
"""The op ``feature``: squared distance of student and teacher rows, normalised on the way.

    distance_i = ||x_i - u_i||^2, of x = student / ||student|| and u likewise with ``normalize``

``unit_feature`` takes a list of pairs, one a tower, and also gives x to the losses that take unit
rows. Its backward adds what all of them want of x to what the distance wants and goes through the
normalisation once:

    d student_i = (p - x (x . p)) / ||student_i||,   p = 2 g_i (x - u) + d x_i

All towers share one launch each way (backends ``cuda`` and ``triton``).

Memory: O(B), and x; the backward reads both inputs again. One pass over memory each way.
"""

from collections.abc import Sequence
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
    return _forward([student], [teacher], normalize, False, backend)[0].flatten()


def unit_feature(
    students: Sequence[Tensor], teachers: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, list[Tensor]]:
    """Squared distance of each pair of normalised rows, and the students' normalised rows.

    Shapes: students, teachers: P matrices each, 1 to 4, all (B, E).
    Returns: (P, B) as ``feature``, and P times (B, E) in its student's dtype, from which the
    distance is not computed: it sees unrounded rows.
    Gradients, raises: as ``feature``, whatever is done with any of these.
    """
    _backend.check_name("feature", backend)
    distances, *units = _forward(students, teachers, True, True, backend)
    return distances, units


@torch.library.custom_op("kdengine::feature_forward", mutates_args=())
def _forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
    unit: bool,
    backend: str,
) -> list[Tensor]:
    module = _backend.choose("feature", [*students, *teachers], backend)
    with _backend.running(students[0]):
        distances, units = module.forward(students, teachers, normalize, unit)
    return [distances, *units]


@_forward.register_fake
def _forward_fake(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
    unit: bool,
    backend: str,
) -> list[Tensor]:
    dtype = _backend.statistics_dtype(*students, *teachers)
    distances = students[0].new_empty((len(students), students[0].shape[0]), dtype=dtype)
    return [distances, *(x.new_empty(x.shape) for x in students if unit)]


@torch.library.custom_op("kdengine::feature_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_units: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
    backend: str,
) -> list[Tensor]:
    module = _backend.choose("feature", [*students, *teachers], backend)
    with _backend.running(students[0]):
        return module.backward(grad, grad_units, students, teachers, normalize)


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    grad_units: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    normalize: bool,
    backend: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in students]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    students, teachers, ctx.normalize, ctx.unit, ctx.backend = inputs
    ctx.save_for_backward(*students, *teachers)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    _backend.refuse_create_graph("feature")
    grad, *of_units = grads
    saved, count = ctx.saved_tensors, len(ctx.saved_tensors) // 2
    students, teachers = saved[:count], saved[count:]
    if grad is None:
        dtype = _backend.statistics_dtype(*saved)
        grad = students[0].new_zeros((count, len(students[0])), dtype=dtype)
    # an empty one wants nothing
    none = students[0].new_empty(0)
    pulls = [none if x is None else x for x in of_units or [None] * count]
    found = _backward(grad, pulls, students, teachers, ctx.normalize, ctx.backend)
    return found, [None] * count, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
