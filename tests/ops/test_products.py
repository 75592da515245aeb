# SPDX-License-Identifier: Apache-2.0
"""How many products of the size of the similarity matrix a step makes: the cost that matters."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses
from kdengine.methods import ClipKD
from kdengine.models import Features
from kdengine.ops import _backend, similarity_blocks
from kdengine_kernels import similarity, similarity_attend, similarity_strips, similarity_sweep

SIZE, WIDTH = 256, 32
UNIT = 2 * SIZE * SIZE * WIDTH
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]


class Counted:
    """A kernel that counts the products of the launches that do not return at once."""

    def __init__(self, kernel: Any, counts: list[float]) -> None:
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            if not (options.get("ONLINE") or options.get("EXACT")):
                sides = ("ROWS", "COLS"), ("SOFT_ROWS", "SOFT_COLS")
                products = sum(any(options.get(flag) for flag in side) for side in sides)
                tile = options["BLOCK_ROWS"] * options["BLOCK_COLS"]
                flops = 2 * grid[0] * tile * options["WIDTH"] * (products or 1)
                self.counts.append(flops / UNIT)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A call that gives the products so far, in units of one B x M x D product."""
    counts: list[float] = []
    for module, name in (
        (similarity_sweep, "_statistics_kernel"),
        (similarity_strips, "_gradient_kernel"),
        (similarity_attend, "_attend_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), counts))
    multiply, add = torch.mm, Tensor.addmm_

    def counted_mm(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        counts.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / UNIT)
        return multiply(a, b, **options)

    def counted_addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        counts.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / UNIT)
        return add(total, a, b)

    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(Tensor, "addmm_", counted_addmm)
    return lambda: sum(counts)


def unit(seed: int, rows: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix is small enough to be kept."""
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", SIZE * SIZE * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("InfoNCE", 4),
        ("InfoNCE + CRD", 6),
        ("rows, constant keys", 2),
        ("rows", 3),
        ("rows of a teacher", 4),
        ("rows of a teacher, constant keys", 3),
    ],
)
def test_products_of_a_loss(
    counter: Any, large: None, backend: str, loss: str, expected: int
) -> None:
    assert count(counter, backend, loss) == pytest.approx(expected)


@interpreted
def test_two_phases_make_no_product_more(
    counter: Any, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "two_phase", lambda *_: True)
    assert count(counter, "triton", "InfoNCE + CRD") == pytest.approx(6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss", "expected"), [("rows", 3), ("rows of a teacher", 4), ("rows, constant keys", 2)]
)
def test_products_of_more_columns_than_rows(
    counter: Any, large: None, backend: str, loss: str, expected: int
) -> None:
    found = count(counter, backend, loss, shape=(SIZE // 2, 2 * SIZE))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("teacher", "expected"), [(False, 4), (True, 6)])
def test_products_of_rows_with_terms_of_their_own(
    counter: Any, large: None, backend: str, teacher: bool, expected: int
) -> None:
    """Each term may get another upstream gradient, which only the backward knows."""
    x, y = unit(0).requires_grad_(), unit(1).requires_grad_()
    options: dict[str, Any] = {"hard_cols": False, "soft_cols": False, "backend": backend}
    if teacher:
        options |= {"teacher_query": unit(2), "teacher_key": unit(3), "teacher_scale": 20.0}
    terms = losses.similarity_terms(x, y, 10.0, **options)
    (terms.hard_rows + 2 * terms.soft_rows).backward()
    assert counter() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("InfoNCE", 3),
        ("InfoNCE + CRD", 4),
        ("rows, constant keys", 2),
        ("rows", 3),
        ("rows of a teacher", 4),
        ("rows of a teacher, constant keys", 3),
    ],
)
def test_small_matrices_are_made_once(counter: Any, loss: str, expected: int) -> None:
    assert count(counter, "torch", loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("backend", "loss", "expected"),
    [
        ("torch", "InfoNCE", 5),
        ("torch", "InfoNCE + CRD", 8),
        pytest.param("triton", "InfoNCE + CRD", 8, marks=interpreted),
    ],
)
def test_low_memory_makes_each_matrix_once_more(
    counter: Any, backend: str, loss: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # blocks of half of the columns, which the tiles with a teacher divide
    monkeypatch.setattr(similarity_blocks, "ROUND", 128)
    monkeypatch.setattr(similarity, "two_phase", lambda *_: False)
    monkeypatch.setattr(_backend, "WORKSPACE", {"cpu": 64 << 10, "low_memory": True})
    assert count(counter, backend, loss, torch.float16) == pytest.approx(expected)


def count(
    counter: Any,
    backend: str,
    loss: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (SIZE, SIZE),
) -> float:
    """The products of a loss and its gradients."""
    rows, cols = shape
    x, y = unit(0, rows).to(dtype).requires_grad_(), unit(1, cols).to(dtype)
    options: dict[str, Any] = {"hard_cols": 0.0} if loss.startswith("rows") else {}
    if "constant keys" not in loss:
        y.requires_grad_()
    if "CRD" in loss or "teacher" in loss:
        options |= {"teacher_query": unit(2, rows), "teacher_key": unit(3, cols)}
        options |= {"teacher_scale": 20.0, "soft_rows": 0.5}
        options |= {"soft_cols": options.get("hard_cols", 0.5)}
    losses.similarity_loss(x, y, 10.0, backend=backend, **options).backward()
    return counter()


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_a_step_of_clip_kd(counter: Any, large: None, backend: str) -> None:
    """6 for InfoNCE + CRD in one sweep, 2 for each direction of ICL, none for FD."""
    method = ClipKD(WIDTH, [WIDTH], backend=backend)
    scale = torch.tensor([10.0], requires_grad=True)
    student = Features(unit(0).requires_grad_(), unit(1).requires_grad_(), scale)
    teacher = Features(unit(2), unit(3), torch.tensor([20.0]))
    terms = method(student, [teacher])
    sum(terms[name] for name in method.weights).backward()
    assert counter() == pytest.approx(10)
