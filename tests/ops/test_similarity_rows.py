# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity_rows``: the oracle's numbers, its contract, and when it is taken."""

import itertools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference
from kdengine.losses import rows as losses_of_rows
from kdengine.ops import _backend, similarity_rows
from kdengine.ops.similarity_rows import _forward, applies
from kdengine_kernels import common

# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
DOUBLE = torch.float64
NAMES = ("query", "key", "scale")
SHAPES = [(1, 1, 3, 2), (2, 3, 5, 2), (63, 65, 37, 13), (65, 31, 8, 3)]
# hard, soft and margin
WEIGHTS = {
    "hard": (1.0, 0.0, 0.0),
    "margin": (-0.7, 0.0, 0.3),
    "soft": (0.0, 1.3, 0.0),
    "both": (0.4, -1.2, 0.0),
    "all": (0.4, 1.2, 0.5),
}


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=DOUBLE), dim=1)


def problem(rows: int, cols: int, width: int, teacher_width: int, scale: float = 9.0) -> dict:
    """Queries that resemble the keys they name, and a teacher."""
    key, labels = unit(cols, width), torch.randint(0, cols, (rows,))
    return {
        "query": F.normalize(unit(rows, width) + key[labels], dim=1),
        "key": key,
        "scale": torch.tensor(scale, dtype=DOUBLE),
        "labels": labels,
        "teacher_query": unit(rows, teacher_width),
        "teacher_key": unit(cols, teacher_width),
        "teacher_scale": torch.tensor(2 * scale, dtype=DOUBLE),
    }


def rounded(p: dict, dtype: torch.dtype) -> dict:
    """In a dtype; numbers in float32 at least."""
    low = torch.promote_types(dtype, torch.float32)
    return {
        k: v if v.dtype == torch.int64 else v.to(dtype if v.ndim else low) for k, v in p.items()
    }


def ours(p: dict, hard: float, soft: float, margin: float, **options: Any) -> Tensor:
    teacher = {}
    if soft:
        teacher = {k: [p[k]] for k in ("teacher_query", "teacher_key")}
        teacher["teacher_scale"] = p["teacher_scale"].reshape(1)
    student = [p[name] for name in (*NAMES, "labels")]
    return similarity_rows(*student, **teacher, hard=hard, soft=soft, margin=margin, **options)


def oracle(p: dict, hard: float, soft: float, margin: float) -> Tensor:
    student = [p[name] for name in (*NAMES, "labels")]
    loss = hard * reference.cluster_cross_entropy(*student, margin) if hard else 0.0
    if soft:
        teacher = {k: v for k, v in p.items() if k.startswith("teacher")}
        weights = {"hard_rows": 0.0, "hard_cols": 0.0, "soft_rows": soft}
        loss = loss + reference.similarity_loss(*student[:3], **teacher, **weights)
    return loss


def differentiate(function, p: dict, weights: tuple, names=NAMES, gain=1.0, **options) -> list:
    """Loss and gradients, for an upstream gradient of -1.7."""
    p = p | {name: p[name].clone().requires_grad_() for name in names}
    loss = function(p, *weights, **options)
    gradients = torch.autograd.grad(-1.7 * gain * loss, [p[name] for name in names])
    assert [x.dtype for x in gradients] == [p[name].dtype for name in names]
    return [loss.detach().double(), *(x.double() / gain for x in gradients)]


@pytest.mark.parametrize("strips", [False, True], ids=["one strip", "strips"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_equal_the_oracle(
    shape: tuple, weights: tuple, strips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strips:
        monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    p = problem(*shape)
    truth = differentiate(oracle, p, weights)
    for x, true_x in zip(differentiate(ours, p, weights), truth, strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-12)


SUBSETS = [names for n in (1, 2) for names in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_any_subset_of_gradients(names: tuple[str, ...]) -> None:
    p = problem(9, 7, 5, 4)
    found = differentiate(ours, p, WEIGHTS["all"], names)
    for x, true_x in zip(found, differentiate(oracle, p, WEIGHTS["all"], names), strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    p = problem(20, 7, 4, 3)
    inputs = [p[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(
        lambda *x: ours(p | dict(zip(NAMES, x, strict=True)), *WEIGHTS["all"]), inputs
    )


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, needs: tuple[bool, ...]) -> None:
    p = rounded(problem(6, 5, 4, 3), dtype)
    learned = [p[k].requires_grad_(need) for k, need in zip(NAMES, needs, strict=True)]
    teacher = [p["teacher_query"]], [p["teacher_key"]], p["teacher_scale"].reshape(1)
    torch.library.opcheck(
        _forward, (*learned, p["labels"], *teacher, 0.4, 1.2, 0.5, *needs, "auto")
    )


def test_whole_loss_compiles_to_one_graph() -> None:
    p = problem(9, 7, 5, 4)

    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        options = {k: v for k, v in p.items() if k not in NAMES}
        return losses.similarity_loss(
            query, key, scale, **options, hard_rows=0.3, hard_cols=0.0, soft_rows=0.6
        )

    inputs = [p[name].requires_grad_() for name in NAMES]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss)]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_create_graph_is_refused() -> None:
    p = problem(3, 2, 2, 2)
    p["query"].requires_grad_()
    with pytest.raises(RuntimeError, match="similarity_rows: .*create_graph=True came"):
        torch.autograd.grad(ours(p, *WEIGHTS["hard"]), p["query"], create_graph=True)


def test_a_second_backward_finds_the_same() -> None:
    p = problem(9, 7, 5, 4)
    leaves = [p[name].requires_grad_() for name in NAMES]
    loss = ours(p, *WEIGHTS["both"])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(2 * x, y)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_rows_without_a_positive(weights: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cross-entropy is infinite and has no gradient; their divergence is as good as any."""
    hard, soft, margin = weights
    p = problem(20, 7, 5, 4)
    p["labels"][::3] = torch.tensor([-1, 7, 100])[torch.arange(7) % 3]
    (loss, *gradients) = differentiate(ours, p, weights)
    assert loss.isinf() == (hard != 0)
    assert all(x.isfinite().all() for x in gradients)
    if not hard:
        truth = differentiate(oracle, p, weights)
        for x, true_x in zip([loss, *gradients], truth, strict=True):
            torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-12)
    else:
        has = (p["labels"] >= 0) & (p["labels"] < 7)
        rest = p | {name: p[name][has] for name in ("query", "labels", "teacher_query")}
        _, true_query, *_ = differentiate(oracle, rest, (hard, 0.0, margin))
        (_, found_query, *_) = differentiate(ours, p, (hard, 0.0, margin))
        expected = torch.zeros_like(found_query)
        expected[has] = true_query * has.double().mean()
        torch.testing.assert_close(found_query, expected, rtol=1e-10, atol=1e-12)


# float16 with a margin takes the general way
LOW = {
    f"{name}, {dtype}": (dtype, weights)
    for name, weights in WEIGHTS.items()
    for dtype in (torch.float32, torch.float16)
    if dtype == torch.float32 or not weights[2]
}
FAR = {"far": (-1.0, 100.0), "near": (1.0, 100.0), "plain": (0.0, 14.0)}
TOLERANCE = {
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-5, 2e-3),
    torch.bfloat16: (1e-5, 4e-3),
}


def assert_accurate(p: dict, dtype: torch.dtype, weights: tuple, **options: Any) -> None:
    """Within the tolerance or twice the error of the dense loss in float32."""
    p = rounded(p, dtype)
    # gradients of a size at which float16 is at its best
    gain = 500 * len(p["query"]) / p["scale"].item() if dtype == torch.float16 else 1.0
    truth = differentiate(oracle, rounded(p, DOUBLE), weights)
    dense = differentiate(oracle, rounded(p, torch.float32), weights)
    found = differentiate(ours, p, weights, gain=gain, **options)
    loss_tolerance, tolerance = TOLERANCE[dtype]
    number = max(p["scale"].item(), p["teacher_scale"].item())
    floor = 0.0
    if options.get("backend") == "triton":
        # half a unit in the last place of a log-sum-exp of that size
        floor = 2**-24 * number * p["scale"].item() * len(p["query"]) ** -0.5
    for i, (x, y, true) in enumerate(zip(found, dense, truth, strict=True)):
        error, size = (x - true).norm().item(), true.norm().item()
        allowed = tolerance * size + floor
        if i == 0:
            allowed = max(loss_tolerance * max(size, 1.0), 2**-23 * number)
        assert error <= max(allowed, 2 * (y - true).norm().item()), (i, error, allowed)


@pytest.mark.parametrize(("dtype", "weights"), LOW.values(), ids=LOW)
@pytest.mark.parametrize("features", FAR.values(), ids=FAR)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_accurate_in_low_precision(
    backend: str,
    features: tuple[float, float],
    dtype: torch.dtype,
    weights: tuple,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    direction, scale = features
    p = problem(150, 70, 40, 24, scale)
    if direction:
        # cosines near -1 or 1: exponentials that share a shift vanish, or are at their largest
        axis = torch.zeros(40, dtype=DOUBLE)
        axis[0] = 8
        p["query"] = F.normalize(p["query"] + axis, dim=1)
        p["key"] = F.normalize(p["key"] + direction * axis, dim=1)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    # so that a repetition has fewer programs than tiles
    monkeypatch.setattr(common, "num_processors", lambda _: 1)
    assert_accurate(p, dtype, weights, backend=backend)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_accurate_in_bfloat16(weights: tuple) -> None:
    assert_accurate(problem(150, 70, 40, 24, 14.0), torch.bfloat16, weights)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 2, 5, 3), (65, 130, 37, 16)], ids=str)
def test_triton_takes_ragged_shapes(shape: tuple, dtype: torch.dtype) -> None:
    for weights in (WEIGHTS["hard"], WEIGHTS["both"]):
        assert_accurate(problem(*shape, 14.0), dtype, weights, backend="triton")


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_uninitialised_memory_is_never_read(backend: str) -> None:
    p = rounded(problem(63, 65, 37, 13), torch.float32)
    for weights in (WEIGHTS["margin"], WEIGHTS["both"]):
        plain = differentiate(ours, p, weights, backend=backend)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            # under this mode torch.empty fills with NaN
            assert torch.empty(3).isnan().all()
            poisoned = differentiate(ours, p, weights, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(x, y) for x, y in zip(plain, poisoned, strict=True))


def taken(
    *,
    rows: int = 64,
    cols: int = 1000,
    dtype: torch.dtype = torch.float32,
    constant_keys: bool = False,
    teachers: int = 0,
    margin: float = 0.0,
    backend: str = "torch",
) -> bool:
    # tensors without memory
    with torch.device("meta"):
        query = torch.empty(rows, 8, dtype=dtype).requires_grad_()
        key = torch.empty(cols, 8, dtype=dtype).requires_grad_(not constant_keys)
    return applies(query, key, torch.tensor(1.0), cols, teachers, margin, backend)


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken()
    assert taken(teachers=1, constant_keys=True)
    # the sweep over constant keys has nothing left to save
    assert not taken(constant_keys=True)
    assert not taken(teachers=2)
    assert taken(margin=0.1, dtype=torch.float16)
    assert not taken(margin=0.1, dtype=torch.float16, backend="triton")
    with torch.no_grad():
        assert not taken()
    monkeypatch.setattr(_backend, "WORKSPACE", {"cpu": 1 << 20, "low_memory": True})
    # the float32 sum is a quarter of the workspace at 8192 keys
    assert taken(cols=8192) and not taken(cols=8193)


def test_low_strips_on_a_gpu_take_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    low = {"dtype": torch.bfloat16, "backend": "triton", "rows": 4096}
    monkeypatch.setitem(_backend.WORKSPACE, "cuda", 640 << 20)
    # 2 bytes a cell, with a teacher 10
    assert taken(cols=1_000_000, **low) and not taken(cols=2_000_000, **low)
    assert taken(cols=250_000, teachers=1, **low)
    assert not taken(cols=300_000, teachers=1, **low)
    # all rows are a strip of their own
    assert taken(cols=300_000, teachers=1, **low | {"rows": 120})
    # no key's gradient to add to
    assert taken(cols=500_000, teachers=1, constant_keys=True, **low)
    assert not taken(cols=530_000, teachers=1, constant_keys=True, **low)


@pytest.mark.parametrize("weights", ["hard", "soft", "both"])
def test_the_general_way_gives_the_same(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hard, soft, _ = WEIGHTS[weights]
    p = problem(20, 7, 5, 4)
    options = {k: v for k, v in p.items() if k not in NAMES}
    options |= {"hard_rows": hard, "soft_rows": soft, "hard_cols": 0.0}
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(losses_of_rows, "applies", lambda *_, at_once=at_once: at_once)
        leaves = [p[name].clone().requires_grad_() for name in NAMES]
        loss = losses.similarity_loss(*leaves, **options)
        found.append([loss.detach(), *torch.autograd.grad(1.3 * loss, leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
