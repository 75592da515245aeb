# SPDX-License-Identifier: Apache-2.0
"""Ways through the Triton kernels that training takes rarely, against float64 on the GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.ops import similarity

DEVICE = "cuda"
# relative error of gradients, and of statistics beside the rounding of the largest logit
LIMITS = {
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (5e-3, 1e-5),
    torch.float16: (3e-3, 1e-5),
}
NAMES = ("query", "key", "scale")


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, device=DEVICE), dim=1)


def problem(rows: int, cols: int, width: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """Some rows and columns without a positive, and a teacher of each of ``widths``."""
    labels = torch.randint(0, cols, (rows,), device=DEVICE)
    col_labels = torch.randint(0, rows, (cols,), device=DEVICE)
    labels[5::7], col_labels[5::7] = -1, rows
    return {
        "query": unit(rows, width),
        "key": unit(cols, width),
        "scale": torch.tensor(14.3, dtype=torch.float64, device=DEVICE),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(rows, other) for other in widths],
        "teacher_key": [unit(cols, other) for other in widths],
        "teacher_scale": torch.tensor([30.0, 9.0][: len(widths)], device=DEVICE).double(),
    }


def plain(rows: int = 301, cols: int = 203, widths: tuple[int, ...] = (40,)) -> dict[str, Any]:
    return problem(rows, cols, 64, widths)


def odd_width() -> dict[str, Any]:
    return problem(301, 203, 37, (41,))


def two_teachers() -> dict[str, Any]:
    return plain(widths=(24, 40))


def negated_towers() -> dict[str, Any]:
    """At scale 100 every cosine is -1, the teacher's too: only the repetitions see anything."""
    p = problem(300, 300, 64, (64,))
    for a, b, r in (("query", "key", "scale"), ("teacher_query", "teacher_key", "teacher_scale")):
        left = p["query"][:1].expand(300, 64).contiguous()
        p |= {a: left, b: -left} if a == "query" else {a: [left], b: [-left]}
        p[r] = torch.full_like(p[r], 100.0)
    return p


CASES: dict[str, tuple[Any, dict[str, bool]]] = {
    "pairs": (plain, {"soft_rows": True, "soft_cols": True}),
    "odd width": (odd_width, {"soft_rows": True, "soft_cols": True}),
    "two teachers": (two_teachers, {"soft_rows": True, "soft_cols": True}),
    "soft columns alone": (two_teachers, {"soft_cols": True}),
    "no teacher, means": (lambda: plain(widths=()), {"means": True}),
    "negated": (negated_towers, {"soft_rows": True, "soft_cols": True}),
}


def cast(p: dict[str, Any], dtype: torch.dtype, teacher_dtype: torch.dtype) -> dict[str, Any]:
    """Features in their dtypes; scales in float32, as the losses hand them over."""
    number = torch.promote_types(dtype, torch.float32)
    return p | {
        "query": p["query"].to(dtype),
        "key": p["key"].to(dtype),
        "scale": p["scale"].to(number),
        "teacher_query": [x.to(teacher_dtype) for x in p["teacher_query"]],
        "teacher_key": [x.to(teacher_dtype) for x in p["teacher_key"]],
        "teacher_scale": p["teacher_scale"].to(number),
    }


def run(p: dict[str, Any], names: tuple[str, ...], gain: float, **options: Any) -> tuple:
    """Statistics, and the gradients of a random mix of them; ``gain`` as in float16 training."""
    p = p | {name: p[name].clone().requires_grad_() for name in names}
    sides = [side for side in similarity(**p, **options) if side]
    generator = torch.Generator(DEVICE).manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for side in sides:
        for x in (side.others, side.positive, side.gap):
            weight = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=DEVICE)
            total = total + (weight * x.double())[x > -torch.inf].sum()
    gradients = torch.autograd.grad(gain * total, [p[name] for name in names])
    return [x for side in sides for x in side], [g.double() / gain for g in gradients]


def compare(
    p: dict[str, Any], dtype: Any, teacher_dtype: Any, names: tuple, **options: Any
) -> None:
    given = cast(p, dtype, teacher_dtype)
    truth = run(cast(given, torch.float64, torch.float64), names, 1.0, backend="torch", **options)
    gain = 64.0 if dtype == torch.float16 else 1.0
    ours = run(given, names, gain, backend="triton", **options)
    gradient_limit, limit = LIMITS[dtype]
    largest = max(p["scale"].item(), *p["teacher_scale"].tolist(), 0.0)
    for x, true_x in zip(ours[0], truth[0], strict=True):
        error = (x.double() - true_x)[true_x.isfinite()].abs()
        assert not len(error) or error.max() <= (limit + 2**-21) * max(largest, 10.0)
    # where a row's pulls cancel, its length before they do is what counts
    least = p["scale"].item() * len(p["query"]) ** 0.5 / 10
    for x, true_x in zip(ours[1], truth[1], strict=True):
        assert (x - true_x).norm() <= gradient_limit * true_x.norm().clamp(min=least)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_statistics_and_gradients_equal_those_in_float64(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, options = CASES[case]
    compare(make(), dtype, dtype, NAMES, **options)


def test_teacher_of_another_dtype() -> None:
    torch.manual_seed(0)
    both = {"soft_rows": True, "soft_cols": True}
    compare(plain(), torch.bfloat16, torch.float32, NAMES, **both)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("case", ["pairs", "odd width", "negated"])
def test_rows_against_constant_keys(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p = CASES[case][0]() | {"teacher_query": [], "teacher_key": []}
    p["teacher_scale"] = p["teacher_scale"][:0]
    compare(p, dtype, dtype, ("query", "scale"), cols=False)
