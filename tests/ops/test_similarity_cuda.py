# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``similarity`` on the CPU: strips, mixed dtypes, contract, refusals.

Values and gradients over the grid of shapes, scales and dtypes are in ``test_interpreted.py``.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses
from kdengine.ops import _backend, extension, similarity
from kdengine.ops.similarity import _backward, _forward

pytestmark = pytest.mark.skipif(bool(extension.why_not("cpu")), reason="kdengine._C is not built")


@pytest.fixture(params=["plain loops", "emulated"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's CPU part, and a GPU's blocks."""
    if request.param == "emulated":
        monkeypatch.setattr(extension, "place", lambda module, _: module.Emulated(late=True))


def unit(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1).to(dtype)


def problem(
    rows: int, cols: int, dtype: torch.dtype, teachers: tuple[torch.dtype, ...] = ()
) -> dict[str, Any]:
    """Labels that repeat, and some rows and columns without a positive."""
    labels, col_labels = torch.randint(0, cols, (rows,)), torch.randint(0, rows, (cols,))
    labels[5::7], col_labels[5::7] = -1, rows
    real = _backend.statistics_dtype(torch.empty(0, dtype=dtype))
    return {
        "query": unit(rows, 20, dtype),
        "key": unit(cols, 20, dtype),
        "scale": torch.tensor(9.0, dtype=real),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(rows, 12 + k, x) for k, x in enumerate(teachers)],
        "teacher_key": [unit(cols, 12 + k, x) for k, x in enumerate(teachers)],
        "teacher_scale": torch.tensor([20.0, 3.0, 50.0][: len(teachers)], dtype=real),
    }


def run(p: dict[str, Any], backend: str) -> list[Tensor]:
    """All statistics, and gradients of a mix of the differentiable ones."""
    leaves = {name: p[name].detach().clone().requires_grad_() for name in ("query", "key", "scale")}
    soft = len(p["teacher_query"]) > 0
    sides = similarity(**p | leaves, means=True, soft_rows=soft, soft_cols=soft, backend=backend)
    learned = [x for side in sides if side for x in (side.others, side.positive, side.gap)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in learned]
    total = sum((w * x)[x > -torch.inf].sum() for w, x in zip(weights, learned, strict=True))
    assert isinstance(total, Tensor)
    return [
        *(x for side in sides if side for x in side),
        *torch.autograd.grad(total, [*leaves.values()]),
    ]


def double(p: dict[str, Any]) -> dict[str, Any]:
    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(y) for y in x]
        return x.double() if x.is_floating_point() else x

    return {name: wide(x) for name, x in p.items()}


@pytest.mark.parametrize("num_teachers", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (130, 70), (127, 257)], ids=str)
def test_float64_equals_the_torch_backend(shape: tuple[int, int], num_teachers: int) -> None:
    p = problem(*shape, torch.float64, (torch.float64,) * num_teachers)
    for x, truth in zip(run(p, "cuda"), run(p, "torch"), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("budget", [1, 1 << 30], ids=["low strips", "one strip"])
@pytest.mark.parametrize(
    "teachers",
    [
        (torch.float32,),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=len,
)
def test_teachers_of_other_dtypes_lose_nothing(
    teachers: tuple, budget: int, blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(300, 140, torch.bfloat16, teachers)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", budget)
    *found, query, key, scale = run(p, "cuda")
    *truth, true_query, true_key, true_scale = run(double(p), "torch")
    for x, true in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), true, rtol=1e-5, atol=2e-5)
    for x, true in ((query, true_query), (key, true_key), (scale, true_scale)):
        assert (x.double() - true).norm() <= 4e-3 * true.norm()


def test_gradcheck() -> None:
    p = problem(5, 7, torch.float64, (torch.float64,))

    def learned(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        given = p | {"query": query, "key": key, "scale": scale}
        sides = similarity(**given, soft_rows=True, soft_cols=True, backend="cuda")
        return tuple(x for side in sides if side for x in (side.others, side.positive, side.gap))

    inputs = [p[name].requires_grad_() for name in ("query", "key", "scale")]
    assert torch.autograd.gradcheck(learned, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    p = problem(5, 7, dtype, (dtype, dtype))
    args = [*p.values()]
    flags = (True, True, True, True, True, False, False)
    stats = _forward(*args, *flags, "cuda")
    grads = [torch.rand_like(x) for x in stats[:4]]
    torch.library.opcheck(
        _backward, (grads, *args, list(stats[:4]), stats[5], True, True, True, "cuda")
    )
    args[0].requires_grad_()
    torch.library.opcheck(_forward, (*args, *flags, "cuda"))


def test_an_op_without_cuda_is_refused_by_name() -> None:
    x, y = (unit(4, 3, torch.float32).requires_grad_() for _ in range(2))
    with pytest.raises(RuntimeError, match="similarity_rows: .*'cuda' .* no cuda implementation"):
        losses.cluster_cross_entropy(x, y, 9.0, torch.arange(4), backend="cuda")
    with pytest.raises(RuntimeError, match="gradient: .*'cuda' .* no cuda implementation"):
        losses.gradient(x, y, 9.0, x.detach(), y.detach() + x.detach(), 9.0, backend="cuda")


def test_wrong_operands_are_refused_by_the_extension(blocks: None) -> None:
    x, one = torch.zeros(4, 4), torch.ones(1)
    labels = [torch.zeros(4, dtype=torch.int32)] * 2
    none, out = torch.empty(0), torch.empty(4, 4)

    def gradient(*logits: Tensor, labels: list[Tensor] = labels, out: Tensor = out) -> None:
        extension.call("similarity_gradient", logits, labels, [none, none], none, one, out)

    gradient(x, x, one)
    assert (out == 0).all()
    with pytest.raises(ValueError, match=r"pieces of 16 bytes.*; \(4, 3\) float32 came"):
        gradient(x[:, :3], x[:, :3], one)
    with pytest.raises(ValueError, match=r"of one dtype; \(4, 4\) float32 and \(4, 4\) bfloat16"):
        gradient(x, x.bfloat16(), one)
    with pytest.raises(ValueError, match=r"expected labels \(1, 4\) int32; \(1, 4\) float32 came"):
        gradient(x, x, one, labels=[one.expand(4).contiguous()] * 2)
    with pytest.raises(ValueError, match=r"expected a strip \(4, 4\); \(3, 4\) float32 came"):
        gradient(x, x, one, out=out[:3])
