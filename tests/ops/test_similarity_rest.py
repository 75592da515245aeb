# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity_rest`` against a dense matrix in float64, and its contract."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.ops import _backend, set_workspace, similarity_rest
from kdengine.ops.similarity_rest import _backward, _forward

DOUBLE = torch.float64
SHAPES = [(1, 2, 3, 1), (5, 7, 4, 7), (67, 301, 13, 9), (130, 5000, 8, 64)]


@pytest.fixture(autouse=True)
def workspace() -> Iterator[None]:
    """As it was, afterwards."""
    before = dict(_backend.WORKSPACE)
    yield
    _backend.WORKSPACE.update(before)


def problem(rows: int, cols: int, width: int, count: int) -> list[Tensor]:
    """Unit rows, a scale, and different columns of each row, of which some do not exist."""
    query, key = (F.normalize(torch.randn(n, width, dtype=DOUBLE), dim=1) for n in (rows, cols))
    columns = torch.rand(rows, cols + 2).argsort(1)[:, :count] - 1
    return [query, key, torch.tensor(20.0, dtype=DOUBLE), columns]


def dense(query: Tensor, key: Tensor, scale: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    z = scale * query @ key.T
    rest, logits = [], []
    for row, named in zip(z, columns.tolist(), strict=True):
        there = [n for n in named if 0 <= n < len(key)]
        left = [n for n in range(len(key)) if n not in there]
        rest.append(row[left].logsumexp(0))
        zero = row.new_zeros(())
        logits.append(torch.stack([row[n] if n in there else zero for n in named]))
    return torch.stack(rest), torch.stack(logits)


def weighed(found: tuple[Tensor, Tensor]) -> Tensor:
    """A number with an upstream gradient of its own for every result that is finite."""
    rest, logits = found
    rest = rest.masked_fill(rest == -torch.inf, 0)
    of_rest = torch.linspace(-1, 2, rest.numel(), dtype=rest.dtype)
    of_logits = torch.linspace(1, -3, logits.numel(), dtype=rest.dtype).view_as(logits)
    return (rest * of_rest).sum() + (logits * of_logits).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(DOUBLE, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)],
    ids=str,
)
def test_results_and_gradients_are_those_of_the_matrix(
    shape: tuple[int, ...], dtype: torch.dtype, error: float
) -> None:
    set_workspace(1 << 20)
    query, key, scale, columns = problem(*shape)
    low = torch.promote_types(dtype, torch.float32)
    given = [query.to(dtype), key.to(dtype), scale.to(low)]
    ours = [x.clone().requires_grad_() for x in given]
    theirs = [x.to(DOUBLE).requires_grad_() for x in given]
    found, truth = similarity_rest(*ours, columns), dense(*theirs, columns)
    for x, true_x in zip(found, truth, strict=True):
        assert x.dtype == low
        # products are never rounded to the features' dtype
        torch.testing.assert_close(x.to(DOUBLE), true_x, rtol=2e-6, atol=2e-5)
    gradients = [
        torch.autograd.grad(weighed(x), leaves) for x, leaves in ((found, ours), (truth, theirs))
    ]
    for x, true_x, like in zip(*gradients, given, strict=True):
        assert x.dtype == like.dtype
        assert (x.to(DOUBLE) - true_x).norm() <= 10 * error * true_x.norm() + 1e-4 * (error > 1e-9)


def test_a_rest_far_below_the_named_columns_keeps_its_digits() -> None:
    key = F.normalize(torch.randn(400, 64, dtype=DOUBLE), dim=1)
    query = F.normalize(key[:40] + 0.02 * torch.randn(40, 64, dtype=DOUBLE), dim=1)
    scale, columns = torch.tensor(100.0, dtype=DOUBLE), torch.arange(40)[:, None]
    given = [query, key, scale]
    ours = [x.float().requires_grad_() for x in given]
    theirs = [x.detach().to(DOUBLE).requires_grad_() for x in ours]
    found, truth = similarity_rest(*ours, columns), dense(*theirs, columns)
    # nothing of it would be left of a difference of float32
    assert (truth[0] - truth[1][:, 0]).max() < -30
    torch.testing.assert_close(found[0].to(DOUBLE), truth[0], rtol=1e-6, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(found[0].sum(), ours),
        torch.autograd.grad(truth[0].sum(), theirs),
        strict=True,
    )
    for x, true_x in pairs:
        assert (x.to(DOUBLE) - true_x).norm() < 2e-5 * true_x.norm()


def test_nothing_left_is_minus_infinity_and_has_no_gradient() -> None:
    query, key, scale, _ = problem(3, 4, 5, 1)
    columns = torch.arange(4).expand(3, 4)
    leaves = [x.requires_grad_() for x in (query, key, scale)]
    rest, logits = similarity_rest(*leaves, columns)
    assert rest.tolist() == [-torch.inf] * 3
    torch.testing.assert_close(logits, scale * query @ key.T)
    gradients = torch.autograd.grad(rest, leaves, torch.ones(3, dtype=DOUBLE))
    assert all(x.abs().max() == 0 for x in gradients)


def test_strips_of_any_height_give_the_same() -> None:
    problem_ = problem(130, 700, 8, 5)
    set_workspace(1 << 20)
    small = similarity_rest(*problem_)
    set_workspace(1 << 28)
    whole = similarity_rest(*problem_)
    for x, y in zip(small, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_it_is_a_custom_op_with_all_it_takes() -> None:
    query, key, scale, columns = problem(4, 6, 3, 2)
    leaves = [x.requires_grad_() for x in (query, key, scale)]
    torch.library.opcheck(_forward, (*leaves, columns, "auto"))
    rest, _ = similarity_rest(*leaves, columns)
    given = [x.detach() for x in (rest, rest[:, None].expand(-1, 2), *leaves)]
    torch.library.opcheck(_backward, (*given, columns, rest.detach(), "auto"))

    def call(*student: Tensor) -> Tensor:
        return weighed(similarity_rest(*student, columns))

    assert torch.autograd.gradcheck(call, leaves)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(call(*leaves), leaves, create_graph=True)


def test_another_backend_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no triton implementation of similarity_rest"):
        similarity_rest(*problem(4, 6, 3, 2), backend="triton")
