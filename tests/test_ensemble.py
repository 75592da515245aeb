# SPDX-License-Identifier: Apache-2.0
"""Several teachers' features as one: what comes out, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kdengine.losses import ensemble


def rows_of(*widths: int) -> list[Tensor]:
    return [torch.randn(6, width, dtype=torch.float64) for width in widths]


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def test_a_cosine_of_concatenated_teachers_is_the_mean_of_theirs() -> None:
    rows = rows_of(8, 5, 3)
    found = ensemble(rows)
    cosines = torch.stack([unit(x) @ unit(x).T for x in rows])
    torch.testing.assert_close(found @ found.T, cosines.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6).double())
    assert ensemble(rows[:1]) is rows[0]


def test_the_mean_is_the_direction_of_the_sum_of_unit_rows() -> None:
    rows = rows_of(4, 4, 4)
    expected = unit(sum(map(unit, rows[1:]), unit(rows[0])))
    torch.testing.assert_close(ensemble(rows, "mean"), expected, rtol=1e-12, atol=1e-14)


def test_low_precision_is_rounded_once() -> None:
    rows = [x.bfloat16() for x in rows_of(8, 5)]
    found = ensemble(rows)
    expected = torch.cat([unit(x.float()) for x in rows], 1) / 2**0.5
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([(6, 8), (6, 5)], "mean", r'"mean" needs teachers of one width; \[8, 5\] came; use'),
        ([(6, 8), (5, 8)], "concat", r"the same rows; \[6, 5\] came"),
        ([(6, 8)], "sum", "'sum' came"),
        ([], "concat", "at least one teacher"),
    ],
    ids=["widths", "rows", "word", "none"],
)
def test_what_cannot_be_united_is_refused(rows: Any, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble([torch.ones(*shape) for shape in rows], how)


def test_a_teacher_that_learns_is_refused() -> None:
    learns = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient; run the teacher under"):
        ensemble([torch.ones(2, 3), learns])
