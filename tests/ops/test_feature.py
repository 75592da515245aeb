# SPDX-License-Identifier: Apache-2.0
"""The op ``feature`` on its backends: dense truth, custom op contract, strips, refusals."""

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.ops import extension, feature, feature_torch, unit_feature
from kdengine.ops.feature import _backward, _forward

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BUILT = pytest.mark.skipif(bool(extension.why_not("cpu")), reason="kdengine._C is not built")
BACKENDS = [
    "torch",
    pytest.param("cuda", marks=BUILT),
    pytest.param("triton", marks=INTERPRETED),
]
EXACT = BACKENDS[:2]
# Triton's interpreter cannot compute in bfloat16
LOW_PRECISION = [
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("torch", torch.float16),
    pytest.param("cuda", torch.float32, marks=BUILT),
    pytest.param("cuda", torch.bfloat16, marks=BUILT),
    pytest.param("cuda", torch.float16, marks=BUILT),
    pytest.param("triton", torch.float32, marks=INTERPRETED),
    pytest.param("triton", torch.float16, marks=INTERPRETED),
]
SHAPES = [(1, 1), (2, 3), (63, 65), (65, 37), (127, 5)]


def pair(num_rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(num_rows, width)).to(dtype), torch.randn(num_rows, width).to(dtype)


def dense(student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return (student - teacher).square().sum(1)


def with_gradient(function, student: Tensor, teacher: Tensor, normalize: bool) -> list[Tensor]:
    student = student.detach().clone().requires_grad_()
    distances = function(student, teacher, normalize=normalize)
    weights = torch.linspace(0.5, 2, len(student), dtype=distances.dtype)
    return [distances.detach(), *torch.autograd.grad((weights * distances).sum(), student)]


@pytest.mark.parametrize("normalize", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_distances_and_gradient_equal_the_dense_ones(
    backend: str, shape: tuple, normalize: bool
) -> None:
    args = (*pair(*shape), normalize)
    function = functools.partial(feature, backend=backend)
    for x, truth in zip(with_gradient(function, *args), with_gradient(dense, *args), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,dtype", LOW_PRECISION, ids=str)
def test_distances_of_low_precision_rows_are_float32(
    backend: str, dtype: torch.dtype, shape: tuple, normalize: bool
) -> None:
    student, teacher = pair(*shape, dtype)
    function = functools.partial(feature, backend=backend)
    distances, gradient = with_gradient(function, student, teacher, normalize)
    truth = with_gradient(dense, student.double(), teacher.double(), normalize)
    assert (distances.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(distances.double(), truth[0], rtol=1e-6, atol=1e-6)
    # in one dimension the gradient of a unit row is 0
    error = (gradient.double() - truth[1]).norm() / truth[1].norm().clamp(min=1)
    assert error < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_length_zero_stay_finite_as_in_torch(backend: str) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if backend != "triton" else (torch.float32, 1e-6)
    student, teacher = pair(4, 3, dtype)
    student[1], student[2], teacher[2] = 0, 1e-14, 0
    ours = with_gradient(functools.partial(feature, backend=backend), student, teacher, True)
    for x, truth in zip(ours, with_gradient(dense, student, teacher, True), strict=True):
        torch.testing.assert_close(x, truth, rtol=tolerance, atol=tolerance)


def test_height_of_the_strips_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*pair(63, 5), True)
    truth = with_gradient(feature, *args)
    monkeypatch.setattr(feature_torch, "STRIP_BYTES", 2 * 5 * 8)
    for x, y in zip(with_gradient(feature, *args), truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    student, teacher = pair(7, 6, torch.float32)
    strided = (student.T.contiguous().T, torch.stack([teacher, teacher], 1)[:, 0], True)
    function = functools.partial(feature, backend=backend)
    for x, y in zip(
        with_gradient(function, *strided),
        with_gradient(function, student, teacher, True),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def shared(students: list[Tensor], teachers: list[Tensor], backend: str) -> list[list[Tensor]]:
    """A tower's distances, unit rows, and the gradient of a mix of both, for each tower."""
    students = [x.detach().clone().requires_grad_() for x in students]
    if backend == "dense":
        units = [F.normalize(x, dim=1) for x in students]
        distances = torch.stack(
            [dense(x, u, True) for x, u in zip(students, teachers, strict=True)]
        )
    else:
        distances, units = unit_feature(students, teachers, backend=backend)
    mixed = torch.zeros((), dtype=torch.float64)
    for i, (row, unit) in enumerate(zip(distances, units, strict=True)):
        weights = torch.linspace(0.5, 2 + i, unit.numel(), dtype=torch.float64).view_as(unit)
        # transposed, so that what comes back has other strides
        mixed += (weights * unit).mT.sum() + (weights[:, 0] * row).sum()
    gradients = torch.autograd.grad(mixed, students)
    return [[x.detach() for x in tower] for tower in zip(distances, units, gradients, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,dtype", [("torch", torch.float64), *LOW_PRECISION], ids=str)
def test_unit_rows_come_with_the_distances(backend: str, dtype: torch.dtype, shape: tuple) -> None:
    # image and text; the teacher of one is a part of wider rows
    students, teachers = (list(x) for x in zip(*(pair(*shape, dtype) for _ in "ab"), strict=True))
    wide = torch.cat([teachers[1], teachers[1]], 1)
    towers = shared(students, [teachers[0], wide[:, : shape[1]]], backend)
    truths = shared([x.double() for x in students], [x.double() for x in teachers], "dense")
    eps = torch.finfo(dtype).eps
    accurate = max(1e-6, eps) if dtype != torch.float64 else 1e-13
    for (distances, unit, gradient), truth in zip(towers, truths, strict=True):
        assert (unit.dtype, gradient.dtype) == (dtype, dtype) and unit.shape == shape
        torch.testing.assert_close(distances.double(), truth[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(unit.double(), truth[1], rtol=accurate, atol=accurate)
        # what comes back to low precision rows is rounded to their dtype
        assert (gradient.double() - truth[2]).norm() <= 2 * accurate * truth[2].norm().clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_towers_may_have_several_dtypes(backend: str) -> None:
    dtypes = torch.float32, torch.float16, torch.float32
    students, teachers = (
        list(x) for x in zip(*(pair(9, 6, dtype) for dtype in dtypes), strict=True)
    )
    teachers[0] = teachers[0].half()
    towers = shared(students, teachers, backend)
    truths = shared([x.double() for x in students], [x.double() for x in teachers], "dense")
    for dtype, tower, truth in zip(dtypes, towers, truths, strict=True):
        assert [x.dtype for x in tower] == [torch.float32, dtype, dtype]
        for x, y in zip(tower, truth, strict=True):
            limit = 1e-6 if x.dtype == torch.float32 else 1e-3
            assert (x.double() - y).norm() <= limit * y.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unit_rows_or_distances_alone(backend: str) -> None:
    (student, teacher), (other, guide) = pair(7, 6, torch.float32), pair(7, 6, torch.float32)
    students = [student.requires_grad_(), other.requires_grad_()]
    distances, (unit, _) = unit_feature(students, [teacher, guide], backend=backend)
    weights = torch.rand(7, 6)

    def gradients(loss: Tensor) -> tuple:
        return torch.autograd.grad(loss, students, retain_graph=True, materialize_grads=True)

    def equal(ours: Tensor, truth: Tensor) -> None:
        for x, y in zip(gradients(ours), gradients(truth), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)

    normal = F.normalize(student, dim=1)
    equal((weights * unit).sum(), (weights * normal).sum())
    both = dense(student, teacher, True).sum() + dense(other, guide, True).sum()
    equal(distances.sum(), both)
    equal(distances.sum() + (weights * unit).sum(), both + (weights * normal).sum())


def test_autocast_changes_nothing() -> None:
    student, teacher = pair(9, 8, torch.float32)
    plain = with_gradient(feature, student, teacher, True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = with_gradient(feature, student, teacher, True)
    assert all(torch.equal(x, y) for x, y in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("normalize", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend: str, normalize: bool) -> None:
    student, teacher = pair(5, 4)
    assert torch.autograd.gradcheck(
        lambda x: feature(x, teacher, normalize=normalize, backend=backend),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(5, 4, dtype)
    students, teachers = [student, teacher.clone()], [teacher, student.clone()]
    pulls = [torch.empty(0, dtype=dtype), torch.rand(5, 4).to(dtype)]
    args = (torch.rand(2, 5), pulls, students, teachers, True, backend)
    torch.library.opcheck(_backward, args)
    students = [x.requires_grad_() for x in students]
    for unit in (False, True):
        torch.library.opcheck(_forward, (students, teachers, True, unit, backend))


def test_compiles_to_one_graph() -> None:
    args = (*pair(6, 5), True)
    compiled = torch.compile(feature, fullgraph=True, backend="aot_eager")
    for x, y in zip(with_gradient(compiled, *args), with_gradient(feature, *args), strict=True):
        torch.testing.assert_close(x, y)


def test_towers_compile_to_one_graph() -> None:
    (student, teacher), (other, guide) = pair(6, 5), pair(6, 5)
    students = [student.requires_grad_(), other.requires_grad_()]

    def mixed(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        distances, units = unit_feature(students, teachers)
        return distances.sum() + (units[0] * units[1]).sum()

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    losses = [function(students, [teacher, guide]) for function in (compiled, mixed)]
    torch.testing.assert_close(*losses)
    found = [torch.autograd.grad(loss, students) for loss in losses]
    torch.testing.assert_close(*found)


def test_create_graph_is_refused() -> None:
    student, teacher = pair(3, 2)
    distances = feature(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="feature: gradients are of first order only"):
        torch.autograd.grad(distances.sum(), student, create_graph=True)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="feature: backend is one of .*; 'numpy' came"):
        feature(*pair(2, 2), backend="numpy")
