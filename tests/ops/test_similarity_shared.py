# SPDX-License-Identifier: Apache-2.0
"""The short cut of the ``torch`` backend on a CPU: the same numbers, where it may be taken."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.ops import _backend, similarity, similarity_shared

NAMES = ("query", "key", "scale")


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def pairs(rows: int, scale: float, num_teachers: int = 2) -> dict[str, Any]:
    """Pairs in a shuffled order, a few without their partner."""
    order = torch.randperm(rows)
    labels, col_labels = order.clone(), order.argsort()
    col_labels[order[:3]], labels[:3] = rows, -1
    return {
        "query": unit(rows, 12),
        "key": unit(rows, 12),
        "scale": torch.tensor(scale, dtype=torch.float64),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(rows, 8) for _ in range(num_teachers)],
        "teacher_key": [unit(rows, 8) for _ in range(num_teachers)],
        "teacher_scale": torch.tensor([20.0, 3.0], dtype=torch.float64)[:num_teachers],
    }


def negated(rows: int) -> dict[str, Any]:
    """At scale 100 every cosine of one column is -1, those of the others are 1."""
    p = pairs(rows, 100.0, 0)
    p["key"] = p["key"][:1].expand(rows, 12).clone()
    p["query"] = p["key"].clone()
    p["key"][5] *= -1
    return p


def run(p: dict[str, Any]) -> list[Tensor]:
    soft = len(p["teacher_query"]) > 0
    p = p | {name: p[name].clone().requires_grad_() for name in NAMES}
    sides = similarity(**p, soft_rows=soft, soft_cols=soft)
    outputs = [x for side in sides if side for x in side]
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for side in sides:
        for x in (side.others, side.positive, side.gap) if side else ():
            weight = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            total = total + (weight * x.double())[x > -torch.inf].sum()
    return [*outputs, *torch.autograd.grad(total, [p[name] for name in NAMES])]


def single(p: dict[str, Any]) -> dict[str, Any]:
    def low(value: Any) -> Any:
        if isinstance(value, list):
            return [x.float() for x in value]
        return value.float() if value.is_floating_point() else value

    return {name: low(value) for name, value in p.items()}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts of the short cut gave a result."""
    seen: list[str] = []
    forward, backward = similarity_shared.forward, similarity_shared.backward

    def seen_forward(*args: Any) -> Any:
        found = forward(*args)
        if found is not None:
            seen.append("forward")
        return found

    def seen_backward(*args: Any) -> Tensor:
        seen.append("backward")
        return backward(*args)

    monkeypatch.setattr(similarity_shared, "forward", seen_forward)
    monkeypatch.setattr(similarity_shared, "backward", seen_backward)
    return seen


def general(p: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as without:
        without.setattr(similarity_shared, "are_pairs", lambda *_: False)
        return run(p)


@pytest.mark.parametrize("strips", [False, True], ids=["one strip", "strips"])
@pytest.mark.parametrize("num_teachers", [0, 1, 2])
@pytest.mark.parametrize("scale", [1e-3, 14.0])
def test_pairs_take_it_and_get_the_same_numbers(
    scale: float, num_teachers: int, strips: bool, taken: list[str], monkeypatch: Any
) -> None:
    if strips:
        monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    p = pairs(83, scale, num_teachers)
    for x, true_x in zip(run(p), general(p, monkeypatch), strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-11, atol=1e-12)
    assert set(taken) == {"forward", "backward"}


def test_float32_loses_nothing(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    p = pairs(83, 14.0)
    for x, true_x in zip(run(single(p)), general(p, monkeypatch), strict=True):
        torch.testing.assert_close(x.double(), true_x, rtol=1e-5, atol=1e-5)
    assert set(taken) == {"forward", "backward"}


def test_sums_that_would_vanish_take_the_general_way(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = negated(40)
    for x, true_x in zip(run(single(p)), general(p, monkeypatch), strict=True):
        torch.testing.assert_close(x.double(), true_x, rtol=1e-4, atol=1e-4)
    assert "backward" not in taken
    # in float64 nothing vanishes
    for x, true_x in zip(run(p), general(p, monkeypatch), strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-10)
    assert "forward" in taken


@pytest.mark.parametrize(
    ("labels", "col_labels", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], True),
        ([2, 0, 1], [1, 2, 0], True),
        ([2, -1, 1], [3, 2, 0], True),
        ([0, 0, 2], [0, 1, 2], False),
        ([0, 1, 2], [0, 1, 1], False),
        ([0, 1, -1], [0, 1, 2], False),
    ],
    ids=["in order", "shuffled", "some alone", "two rows one column", "the reverse", "one way"],
)
def test_pairs_are_recognised(labels: list[int], col_labels: list[int], expected: bool) -> None:
    assert similarity_shared.are_pairs(torch.tensor(labels), torch.tensor(col_labels)) == expected
