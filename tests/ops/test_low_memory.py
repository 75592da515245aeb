# SPDX-License-Identifier: Apache-2.0
"""The workspace holds everything but results and statistics, in the low memory mode the sum too."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import peak_bytes
from kdengine import losses
from kdengine.ops import _backend, set_workspace, similarity, similarity_blocks
from kdengine_kernels import similarity_strips

# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

KIB = 1 << 10
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1).to(dtype)


def make_step(
    rows: int, width: int, dtype: torch.dtype, backend: str, with_teacher: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Value and gradients of InfoNCE, or InfoNCE + CRD."""
    x, y, u, v = (unit(rows, width, dtype) for _ in range(4))
    scale = torch.tensor(14.3)
    leaves = [w.requires_grad_() for w in (x, y, scale)]
    options: dict[str, Any] = {"backend": backend}
    if with_teacher:
        options |= {"teacher_query": u, "teacher_key": v, "teacher_scale": 30.0}
        options |= {"soft_rows": 0.5, "soft_cols": 0.5}

    def step() -> tuple[Tensor, ...]:
        # float16 holds gradients of this size
        loss = losses.similarity_loss(*leaves, **options)
        gradients = torch.autograd.grad(rows * loss, leaves)
        return loss.detach(), *gradients

    return step


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Sets the workspace, also below what ``set_workspace`` allows, for this test."""
    monkeypatch.setattr(_backend, "WORKSPACE", dict(_backend.WORKSPACE))

    def change(num_bytes: int, low_memory: bool) -> None:
        set_workspace(1 << 20, low_memory=low_memory)
        _backend.WORKSPACE["cpu"] = num_bytes

    return change


def multiply_in_pieces(a: Tensor, b: Tensor) -> Tensor:
    """As on a GPU, where a product takes no memory but its result's."""
    total = a.new_zeros(len(a), b.shape[1], dtype=torch.float32)
    for i in range(0, len(b), 64):
        total.addmm_(a[:, i : i + 64].float(), b[i : i + 64].float())
    return total


def add_in_pieces(total: Tensor, a: Tensor, b: Tensor) -> None:
    for i in range(0, len(total), 64):
        total[i : i + 64].addmm_(a[i : i + 64].float(), b.float())


@pytest.mark.parametrize("with_teacher", [False, True], ids=["InfoNCE", "InfoNCE + CRD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_workspace_is_all(
    backend: str, dtype: torch.dtype, with_teacher: bool, workspace: Any, monkeypatch: Any
) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies it as float32")
    monkeypatch.setattr(similarity_strips, "multiply", multiply_in_pieces)
    monkeypatch.setattr(similarity_strips, "add_product", add_in_pieces)
    # the sum has the bytes of the workspace, or half of them
    rows, width, num_bytes = 512, 256 if backend == "torch" else 128, 512
    workspace(num_bytes * KIB, True)
    peak = peak_bytes(make_step(rows, width, dtype, backend, with_teacher), CPU)
    results = 2 * rows * width * dtype.itemsize
    # 40 numbers a row and a column
    assert peak <= num_bytes * KIB + results + 40 * 4 * 2 * rows, peak / KIB


@pytest.mark.parametrize("with_teacher", [False, True], ids=["clusters", "teacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_hold_their_gradients_as_well(
    backend: str, with_teacher: bool, workspace: Any
) -> None:
    rows, cols, width, num_bytes = 256, 1024, 128, 2048 * KIB
    workspace(num_bytes, False)
    x, y, u = (unit(n, width, torch.float32) for n in (rows, cols, rows))
    leaves = [w.requires_grad_() for w in (x, y, torch.tensor(14.3))]
    labels = torch.randint(0, cols, (rows,))

    def step() -> tuple[Tensor, ...]:
        if with_teacher:
            teacher = (u, y.detach(), 30.0)
            loss = losses.logit_kl(*leaves, *teacher, backend=backend)
        else:
            loss = losses.cluster_cross_entropy(*leaves, labels, 0.1, backend=backend)
        return torch.autograd.grad(loss, leaves)

    # what the forward made, and what the backward makes of it
    gradients = 2 * 4 * (rows + cols) * width
    peak = peak_bytes(step, CPU)
    assert peak <= num_bytes + gradients + 40 * 4 * (rows + cols), peak / KIB


@pytest.mark.parametrize("backend", BACKENDS)
def test_else_the_sum_comes_on_top(backend: str, workspace: Any, monkeypatch: Any) -> None:
    widths = []
    real = similarity_blocks.num_columns
    monkeypatch.setattr(
        similarity_blocks, "num_columns", lambda *args: widths.append(real(*args)) or widths[-1]
    )
    for low_memory in (False, True):
        workspace(256 * KIB, low_memory)
        make_step(300, 64, torch.float16, backend, False)()
    assert widths == [300, 256]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_of_the_shorter_side(backend: str, workspace: Any, monkeypatch: Any) -> None:
    """Of the keys, unless there are more of them than of queries."""
    summed = []
    real = similarity_blocks.num_columns
    monkeypatch.setattr(
        similarity_blocks,
        "num_columns",
        lambda key, limit: summed.append(len(key)) or real(key, limit),
    )
    workspace(KIB, False)
    for rows, cols in ((70, 40), (40, 70)):
        query, key = (unit(n, 16, torch.float16).requires_grad_() for n in (rows, cols))
        losses.similarity_lse(query, key, 9.0, backend=backend).sum().backward()
        truth = [x.double().detach().requires_grad_() for x in (query, key)]
        (9.0 * truth[0] @ truth[1].T).logsumexp(1).sum().backward()
        for x, true in zip((query, key), truth, strict=True):
            assert (x.grad - true.grad).norm() <= 2e-3 * true.grad.norm()
    assert summed == [40, 40]


def problem(dtype: torch.dtype) -> dict[str, Any]:
    """Repeated labels, rows and columns without a positive, two teachers."""
    rows, cols = 260, 258
    labels, col_labels = torch.randint(0, cols, (rows,)), torch.randint(0, rows, (cols,))
    labels[5::7], col_labels[5::7] = -1, rows
    return {
        "query": unit(rows, 40, dtype).requires_grad_(),
        "key": unit(cols, 40, dtype).requires_grad_(),
        "scale": torch.tensor(9.0, requires_grad=True),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(rows, 24, dtype), unit(rows, 40, dtype)],
        "teacher_key": [unit(cols, 24, dtype), unit(cols, 40, dtype)],
        "teacher_scale": torch.tensor([20.0, 3.0]),
    }


SIDES = {
    "all": {"soft_rows": True, "soft_cols": True},
    "hard": {},
    "rows": {"cols": False, "soft_rows": True},
    "cols": {"rows": False, "soft_cols": True},
}


@pytest.mark.parametrize("flags", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_columns_change_nothing(backend: str, flags: dict, workspace: Any) -> None:
    p = problem(torch.float16)

    def gradients() -> tuple[Tensor, ...]:
        sides = similarity(**p, **flags, backend=backend)
        outputs = [x for side in sides if side for x in (side.others, side.positive, side.gap)]
        weights = [torch.linspace(-1, 2, x.shape[-1]).expand_as(x) for x in outputs]
        total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        return torch.autograd.grad(total, [p[name] for name in ("query", "key", "scale")])

    workspace(1 << 20, False)
    whole = gradients()
    # a block of 256 columns, and one of 2
    workspace(80 * KIB, True)
    assert similarity_blocks.num_columns(p["key"], _backend.sum_bytes(p["key"])) == 256
    for x, y in zip(gradients(), whole, strict=True):
        assert (x.double() - y.double()).norm() <= 2e-3 * y.double().norm()
