# SPDX-License-Identifier: Apache-2.0
"""IFAlign over ranks: moments of the global batch, and gradients that are those of one process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference
from kdengine.losses import moment_alignment


def aligned(rank: int, world_size: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    group = torch.distributed.group.WORLD
    student, teacher = (x.chunk(world_size)[rank].clone() for x in rows)
    student.requires_grad_()
    loss = moment_alignment(student, teacher, group=group)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad / world_size


def uneven(rank: int, world_size: int) -> str:
    group = torch.distributed.group.WORLD
    with pytest.raises(ValueError) as caught:
        moment_alignment(torch.zeros(2 + rank, 3), torch.zeros(2 + rank, 3), group=group)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_moments_are_those_of_all_ranks_and_so_are_gradients(
    run_ranks: Any, world_size: int
) -> None:
    rows = torch.randn(2, 12, 5, dtype=torch.float64).unbind()
    whole = rows[0].clone().requires_grad_()
    truth = reference.moment_alignment(whole, rows[1])
    truth.backward()
    told = run_ranks(aligned, world_size, rows)
    for loss, _ in told:
        torch.testing.assert_close(loss, truth.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in told]), whole.grad)


def test_uneven_ranks_are_refused(run_ranks: Any) -> None:
    for message in run_ranks(uneven, 2):
        assert "needs the same number of rows on every rank; rank 0: 2, rank 1: 3" in message


def test_moments_of_unequal_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="need one shape, of at least one row"):
        moment_alignment(torch.zeros(3, 2), torch.zeros(4, 2))


def test_alignment_is_zero_where_moments_are_equal_and_sees_nothing_else() -> None:
    teacher = F.normalize(torch.randn(8, 6, dtype=torch.float64), dim=1)
    student = 2 * teacher.mean(0) - teacher
    assert moment_alignment(student, teacher).item() == pytest.approx(0, abs=1e-15)
    assert moment_alignment(student * 1.1, teacher).item() > 1e-3
    shuffled = moment_alignment((student * 1.1)[torch.randperm(8)], teacher)
    assert shuffled.item() == pytest.approx(moment_alignment(student * 1.1, teacher).item())
