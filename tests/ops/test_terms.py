# SPDX-License-Identifier: Apache-2.0
"""The op ``terms`` on its backends against the losses' own arithmetic in float64."""

import functools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.losses.sweep import Reduced
from kdengine.losses.terms import all_terms
from kdengine.ops import Statistics, extension, has_terms
from kdengine.ops.terms import _backward, _forward

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1; tests/gpu runs them on a GPU",
)
BUILT = pytest.mark.skipif(bool(extension.why_not("cpu")), reason="kdengine._C is not built")
BACKENDS = [pytest.param("triton", marks=INTERPRETED), pytest.param("cuda", marks=BUILT)]
# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

NAMES = ("others", "positive", "gap")
# upstream gradients of the four terms
WEIGHTS = (0.7, -0.4, 1.3, 0.6)
FLAGS = {
    "all": ((True, True), (True, True)),
    "hard": ((True, True), (False, False)),
    "soft": ((False, False), (True, True)),
    "rows": ((True, False), (True, False)),
    "cols": ((False, True), (False, True)),
    "crossed": ((True, False), (False, True)),
}


def reduced(size: int, num_teachers: int, spread: float, share: float) -> Reduced:
    """What statistics can be: ``spread`` makes pairs certain or hopeless.

    The first item has nothing but a positive, every fifth has none.
    """
    x = spread * torch.randn(2 + 4 * num_teachers, size)
    teachers = x[2:].view(4, num_teachers, size)
    x[0, 0] = teachers[0, :, 0] = -torch.inf
    teachers[2:, :, 0] = 0
    labels = torch.randint(0, 9, (size,))
    labels[2::10], labels[7::10] = -1, 9
    return Reduced(Statistics(x[0], x[1], x[:0], *teachers), labels, 9, share)


def leaves(side: Reduced, dtype: torch.dtype) -> Reduced:
    stats = Statistics(*(x.to(dtype) for x in side.statistics))
    learned = {name: getattr(stats, name).clone().requires_grad_() for name in NAMES}
    return side._replace(statistics=stats._replace(**learned))


def run(sides: list[Reduced], hard: Any, soft: Any, backend: str) -> list[Tensor]:
    """All terms, and the gradients of their weighted sum."""
    on = [
        side if is_hard or is_soft else None
        for side, is_hard, is_soft in zip(sides, hard, soft, strict=True)
    ]
    off = torch.zeros((), dtype=sides[0].statistics.others.dtype)
    found = all_terms(*on, hard, soft, off, backend)
    learned = [getattr(side.statistics, name) for side in on if side for name in NAMES]
    total = sum(w * x for w, x in zip(WEIGHTS, found, strict=False))
    gradients = torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in found), *gradients]


@pytest.mark.parametrize("spread", [0.1, 40.0])
@pytest.mark.parametrize("sizes", [(1, 7), (1025, 2050)], ids=str)
@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_equal_the_arithmetic_of_the_losses(
    backend: str, flags: Any, num_teachers: int, sizes: tuple[int, int], spread: float
) -> None:
    sides = [reduced(n, num_teachers, spread, s) for n, s in zip(sizes, (1.0, 2.5), strict=True)]
    truth = run([leaves(x, torch.float64) for x in sides], *flags, "torch")
    ours = run([leaves(x, torch.float32) for x in sides], *flags, backend)
    for i, (x, true_x) in enumerate(zip(ours, truth, strict=True)):
        assert x.dtype == torch.float32
        torch.testing.assert_close(
            x.double(), true_x.double(), rtol=2e-5, atol=2e-6 * spread if i < 6 else 1e-7
        )


# one label that names no cell makes a hard term infinite; with labels that do, it is a number
@pytest.mark.parametrize("all_named", [False, True])
@pytest.mark.parametrize("sizes", [(1, 7), (1025, 2050)], ids=str)
@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@BUILT
def test_terms_of_the_extension_are_exact_in_float64(
    flags: Any, num_teachers: int, sizes: tuple[int, int], all_named: bool
) -> None:
    sides = [reduced(n, num_teachers, 5.0, s) for n, s in zip(sizes, (1.0, 2.5), strict=True)]
    if all_named:
        sides = [x._replace(labels=torch.zeros_like(x.labels)) for x in sides]
    truth = run([leaves(x, torch.float64) for x in sides], *flags, "torch")
    ours = run([leaves(x, torch.float64) for x in sides], *flags, "cuda")
    for x, size, is_hard in zip(ours, sizes, flags[0], strict=False):
        assert not is_hard or bool(x.isfinite()) == (all_named or size == 1)
    for x, true_x in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-12, atol=1e-14)


@BUILT
def test_two_runs_and_any_number_of_threads_give_the_same_bits() -> None:
    sides = [leaves(reduced(n, 2, 5.0, 1.0), torch.float32) for n in (4099, 1500)]
    sides = [x._replace(labels=x.labels.clamp(0, 8)) for x in sides]
    first, threads = run(sides, *FLAGS["all"], "cuda"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = run(sides, *FLAGS["all"], "cuda")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_pairs_keep_their_relative_accuracy(backend: str) -> None:
    for margin in (-60.0, -30.0, -10.0, -1.0, 0.0, 1.0, 30.0):
        x, nothing = torch.tensor([margin]), torch.empty(0, 0)
        stats = Statistics(x, torch.zeros(1), torch.empty(0), *[nothing] * 4)
        side = Reduced(stats, torch.zeros(1, dtype=torch.int64), 1, 1.0)
        loss = all_terms(side, None, (True, False), (False, False), torch.zeros(()), backend)[0]
        truth = F.softplus(torch.tensor(margin, dtype=torch.float64))
        assert abs(loss - truth) <= 3e-7 * truth


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_that_nobody_differentiates(backend: str) -> None:
    side = leaves(reduced(5, 1, 1.0, 1.0), torch.float32)
    off = torch.zeros(())
    found = all_terms(side, None, (True, False), (True, False), off, backend)
    assert not found[4].requires_grad
    (gradient,) = torch.autograd.grad(found[2], side.statistics.gap)
    assert gradient.shape == (1, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_is_registered_as_it_should_be(backend: str) -> None:
    side = leaves(reduced(5, 2, 1.0, 1.0), torch.float32)
    vectors = [side.statistics[i] for i in (0, 1, 3, 4, 5, 6)]
    options = [[9, 9], [1.0, 1.0], [True, False], [True, False], backend]
    torch.library.opcheck(_forward, (vectors, [], side.labels, side.labels, *options))
    constants = [x.detach() for x in vectors]
    torch.library.opcheck(
        _backward, (torch.ones(2), constants, [], side.labels, side.labels, *options)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_need_not_be_contiguous(backend: str) -> None:
    side = reduced(37, 2, 1.0, 1.0)
    others, positive, mean, *teachers = side.statistics
    vectors = (torch.stack([x, x], 1)[:, 0] for x in (others, positive))
    # strides as those of a slice, and as those of columns that ranks have merged
    slices = (torch.stack([x, x], 1)[:, 0] for x in teachers[:2])
    merged = (x.mT.contiguous().mT for x in teachers[2:])
    statistics = Statistics(*vectors, mean, *slices, *merged)
    labels = torch.stack([side.labels, side.labels], 1)[:, 0]
    strided = side._replace(statistics=statistics, labels=labels)
    off, flags = torch.zeros(()), ((True, False), (True, False))
    ours, whole = (all_terms(x, None, *flags, off, backend) for x in (strided, side))
    assert all(torch.equal(x, y) for x, y in zip(ours, whole, strict=True))


@BUILT
def test_gradcheck() -> None:
    side = leaves(reduced(6, 2, 1.0, 1.0), torch.float64)
    stats = side.statistics
    # without the item that has nothing but a positive: infinity has no neighbours
    stats = Statistics(*(x[..., 1:] for x in stats))
    side = side._replace(labels=torch.arange(5))

    def soft_and_hard(*learned: Tensor) -> tuple[Tensor, ...]:
        given = stats._replace(**dict(zip(NAMES, learned, strict=True)))
        flags = (True, False), (True, False)
        found = all_terms(side._replace(statistics=given), None, *flags, torch.zeros(()), "cuda")
        return found[0], found[2]

    learned = [getattr(stats, name).detach().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(soft_and_hard, learned)


@BUILT
def test_a_wrong_shape_is_refused_by_the_extension() -> None:
    x, labels = reduced(5, 2, 1.0, 1.0).statistics, torch.zeros(5, dtype=torch.int64)
    rows = [x[i] for i in (0, 1, 3, 4, 5, 6)]
    good: dict[str, Any] = {"rows": rows, "cols": [], "labels": [labels] * 2, "limits": [9, 9]}
    good |= {"shares": [1.0, 1.0], "hard": [True, False], "soft": [True, False]}
    good |= {"values": torch.empty(2), "entropies": torch.empty(1)}
    call = functools.partial(extension.call, "terms_forward")
    call(*good.values())
    for wrong, message in (
        ({"rows": rows[:3]}, "six statistics of a side that has a term; 3 came"),
        ({"rows": [y[:0] if y.dim() > 1 else y for y in rows]}, "items and.*teachers; 5 and 0"),
        ({"rows": [rows[0], rows[1][:3], *rows[2:]]}, r"statistics \(1, 5\) float32; \(1, 3\)"),
        ({"labels": [labels.int()] * 2}, r"labels \(1, 5\) int64; \(1, 5\) int32 came"),
        ({"limits": [9]}, "limits, shares and flags of two sides; 1 came"),
        ({"values": torch.empty(3)}, r"a number a term, \(1, 2\) float32; \(1, 3\)"),
        ({"entropies": torch.empty(2)}, r"a number a soft side, \(1, 1\) float32; \(1, 2\)"),
        ({"values": torch.empty(2).half()}, r"float32 or float64; \(1, 2\) float16 came"),
    ):
        with pytest.raises(ValueError, match=f"terms: expected .*{message}"):
            call(*(good | wrong).values())


def test_torch_uses_the_arithmetic_of_the_losses() -> None:
    assert has_terms("triton") and has_terms("cuda")
    assert not has_terms("torch") and not has_terms("auto")


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str) -> None:
    side = leaves(reduced(5, 1, 1.0, 1.0), torch.float32)
    loss = all_terms(side, None, (False, False), (True, False), torch.zeros(()), backend)[2]
    with pytest.raises(RuntimeError, match="create_graph=True came"):
        torch.autograd.grad(loss, side.statistics.gap, create_graph=True)
