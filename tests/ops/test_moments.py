# SPDX-License-Identifier: Apache-2.0
"""The op ``moments`` on its backends: dense truth, custom op contract, chunks, refusals."""

import functools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdengine.ops import extension, moments
from kdengine.ops.moments import _backward, _forward
from kdengine.ops.moments_cuda import CHUNK

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BUILT = pytest.mark.skipif(bool(extension.why_not("cpu")), reason="kdengine._C is not built")
EXACT = ["torch", pytest.param("cuda", marks=BUILT)]
BACKENDS = [*EXACT, pytest.param("triton", marks=INTERPRETED)]
# Triton's interpreter cannot compute in bfloat16
LOW_PRECISION = [
    *(("torch", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(
        pytest.param("cuda", dtype, marks=BUILT)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    *(pytest.param("triton", dtype, marks=INTERPRETED) for dtype in (torch.float32, torch.float16)),
]
# rows of some lanes, of all, of a chunk and one more, of more chunks than lanes
SHAPES = [(1, 1), (7, 9), (33, 130), (CHUNK, 8), (CHUNK + 1, 5), (34 * CHUNK - 3, 3)]


def pair(num_rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    # means are large beside deviations
    student, teacher = 5 + torch.randn(num_rows, width), 0.1 * torch.randn(num_rows, width) - 3
    return student.to(dtype), teacher.to(dtype)


def dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.stack([student.double(), teacher.double()])
    return both.mean(1), both.var(1, unbiased=False)


def with_gradient(function: Callable, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.detach().clone().requires_grad_()
    mean, variance = function(student, teacher)
    weights = torch.linspace(-0.5, 2, mean.numel(), dtype=torch.float64).view_as(mean)
    loss = (weights * mean).sum() + (weights.flip(0) * variance).sum()
    return [mean.detach(), variance.detach(), *torch.autograd.grad(loss, student)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_moments_and_gradient_equal_the_dense_ones(backend: str, shape: tuple) -> None:
    rows = pair(*shape)
    ours = with_gradient(functools.partial(moments, backend=backend), *rows)
    for x, truth in zip(ours, with_gradient(dense, *rows), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("backend,dtype", LOW_PRECISION, ids=str)
def test_moments_of_low_precision_rows_are_float32(
    backend: str, dtype: torch.dtype, shape: tuple
) -> None:
    student, teacher = pair(*shape, dtype)
    mean, variance, gradient = with_gradient(
        functools.partial(moments, backend=backend), student, teacher
    )
    truth = with_gradient(dense, student.double(), teacher.double())
    assert (mean.dtype, variance.dtype, gradient.dtype) == (torch.float32, torch.float32, dtype)
    torch.testing.assert_close(mean.double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), truth[1], rtol=2e-6, atol=1e-9)
    error = (gradient.double() - truth[2]).norm() / truth[2].norm()
    assert error < max(2e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous_nor_of_one_dtype(backend: str) -> None:
    student, teacher = pair(70, 6, torch.float32)
    teacher = teacher.half()
    strided = student.T.contiguous().T, torch.stack([teacher, teacher], 1)[:, 0]
    function = functools.partial(moments, backend=backend)
    ours = with_gradient(function, *strided)
    for x, y in zip(ours, with_gradient(dense, student, teacher), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend: str) -> None:
    rows = pair(3 * CHUNK + 5, 40, torch.float32)
    function = functools.partial(moments, backend=backend)
    first, threads = with_gradient(function, *rows), torch.get_num_threads()
    try:
        # torch itself sums by threads
        torch.set_num_threads(threads if backend == "torch" else 2)
        second = with_gradient(function, *rows)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_far_from_zero_has_no_variance(backend: str) -> None:
    rows = torch.full((2 * CHUNK, 3), 12345.678)
    mean, variance = moments(rows, rows, backend=backend)
    torch.testing.assert_close(mean, rows[:2], rtol=1e-6, atol=0)
    # the mean may be off by a last place
    assert variance.max() <= (12345.678 * torch.finfo(torch.float32).eps) ** 2


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend: str) -> None:
    student, teacher = pair(5, 4)
    assert torch.autograd.gradcheck(
        lambda x: moments(x, teacher, backend=backend), student.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(5, 4, dtype)
    torch.library.opcheck(_backward, (torch.rand(2, 4), student, torch.rand(4), backend))
    torch.library.opcheck(_forward, (student.requires_grad_(), teacher, backend))


def test_compiles_to_one_graph() -> None:
    rows = pair(6, 5)
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    for x, y in zip(with_gradient(compiled, *rows), with_gradient(moments, *rows), strict=True):
        torch.testing.assert_close(x, y)


def test_create_graph_is_refused() -> None:
    student, teacher = pair(3, 2)
    mean, _ = moments(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="moments: gradients are of first order only"):
        torch.autograd.grad(mean.sum(), student, create_graph=True)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="moments: backend is one of .*; 'numpy' came"):
        moments(*pair(2, 2), backend="numpy")


@BUILT
def test_a_wrong_shape_is_refused_by_the_extension() -> None:
    x, none, out = torch.zeros(3, 4), torch.empty(0), torch.empty(4, 4)
    with pytest.raises(ValueError, match=r"expected at least one row; \(0, 4\) float32 came"):
        moments(x[:0], x[:0], backend="cuda")
    with pytest.raises(ValueError, match=r"like the student, \(3, 4\) float32; \(3, 2\) float32"):
        extension.call("moments_forward", [x, x[:, :2]], none, out)
    with pytest.raises(ValueError, match=r"results \(4, 4\) float32; \(3, 4\) float32 came"):
        extension.call("moments_forward", [x, x], none, x)
    many = torch.zeros(CHUNK + 1, 4)
    with pytest.raises(ValueError, match=r"parts \(8, 4\) float32; \(1, 0\) float32 came"):
        extension.call("moments_forward", [many, many], none, out)
    with pytest.raises(ValueError, match=r"means \(1, 4\) float32; \(1, 3\) float32 came"):
        extension.call("moments_backward", x, torch.zeros(3), torch.zeros(2, 4), x)
