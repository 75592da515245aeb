# SPDX-License-Identifier: Apache-2.0
"""The op ``terms`` in Triton's interpreter against the losses' own arithmetic in float64."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.losses.sweep import Reduced
from kdengine.losses.terms import all_terms
from kdengine.ops import Statistics, has_terms
from kdengine.ops.terms import _forward

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; tests/gpu runs them on a GPU", allow_module_level=True)

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
def test_terms_equal_the_arithmetic_of_the_losses(
    flags: Any, num_teachers: int, sizes: tuple[int, int], spread: float
) -> None:
    sides = [reduced(n, num_teachers, spread, s) for n, s in zip(sizes, (1.0, 2.5), strict=True)]
    truth = run([leaves(x, torch.float64) for x in sides], *flags, "torch")
    ours = run([leaves(x, torch.float32) for x in sides], *flags, "triton")
    for i, (x, true_x) in enumerate(zip(ours, truth, strict=True)):
        assert x.dtype == torch.float32
        torch.testing.assert_close(
            x.double(), true_x.double(), rtol=2e-5, atol=2e-6 * spread if i < 6 else 1e-7
        )


def test_confident_pairs_keep_their_relative_accuracy() -> None:
    for margin in (-60.0, -30.0, -10.0, -1.0, 0.0, 1.0, 30.0):
        x, nothing = torch.tensor([margin]), torch.empty(0, 1)
        stats = Statistics(x, torch.zeros(1), torch.empty(0), *[nothing] * 4)
        side = Reduced(stats, torch.zeros(1, dtype=torch.int64), 1, 1.0)
        loss = all_terms(side, None, (True, False), (False, False), torch.zeros(()), "triton")[0]
        truth = F.softplus(torch.tensor(margin, dtype=torch.float64))
        assert abs(loss - truth) <= 3e-7 * truth


def test_terms_that_nobody_differentiates() -> None:
    side = leaves(reduced(5, 1, 1.0, 1.0), torch.float32)
    off = torch.zeros(())
    found = all_terms(side, None, (True, False), (True, False), off, "triton")
    assert not found[4].requires_grad
    (gradient,) = torch.autograd.grad(found[2], side.statistics.gap)
    assert gradient.shape == (1, 5)


def test_the_op_is_registered_as_it_should_be() -> None:
    side = leaves(reduced(5, 2, 1.0, 1.0), torch.float32)
    vectors = [side.statistics[i] for i in (0, 1, 3, 4, 5, 6)]
    options = [[9, 9], [1.0, 1.0], [True, False], [True, False], "triton"]
    torch.library.opcheck(_forward, (vectors, [], side.labels, side.labels, *options))


def test_other_backends_use_the_arithmetic_of_the_losses() -> None:
    assert has_terms("triton") and not has_terms("torch") and not has_terms("auto")


def test_second_derivatives_are_refused() -> None:
    side = leaves(reduced(5, 1, 1.0, 1.0), torch.float32)
    loss = all_terms(side, None, (False, False), (True, False), torch.zeros(()), "triton")[2]
    with pytest.raises(RuntimeError, match="create_graph=True came"):
        torch.autograd.grad(loss, side.statistics.gap, create_graph=True)
