# SPDX-License-Identifier: Apache-2.0
"""Cosine and CKA of student and teacher: definition, invariances, bias, the working version."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import diagnostics, reference


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def related(num: int, width: int, other: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two views of some common features, off centre as embeddings are."""
    common, views = rows(num, 8), (rows(8, width), rows(8, other))
    return tuple(
        3 * rows(1, v.shape[1]) + common @ v + noise * rows(num, v.shape[1]) for v in views
    )


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(rows(width, width))[0]


# the oracle
def test_mean_cosine_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[5.0, 0.0], [4.0, -3.0]], dtype=torch.float64)
    assert reference.mean_cosine(student, teacher).item() == pytest.approx((1 - 0.6) / 2, rel=1e-15)


def test_biased_cka_by_hand() -> None:
    # centred (-1, 0, 1) and (-1, 2, -1): orthogonal; with the first added, 2^2 / (2 sqrt(8^2))
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [3.0], [0.0]], dtype=torch.float64)
    assert reference.linear_cka(x, y, debiased=False).item() == pytest.approx(0, abs=1e-15)
    both = reference.linear_cka(x, x + y, debiased=False)
    assert both.item() == pytest.approx(2**2 / (2 * 8), rel=1e-14)


def u_statistic(k: Tensor, ell: Tensor) -> float:
    """The unbiased HSIC as a mean over distinct numbers, which is its definition."""
    num = range(len(k))

    def mean(terms: list[float]) -> float:
        return math.fsum(terms) / len(terms)

    pairs = [float(k[i, j] * ell[i, j]) for i, j in itertools.permutations(num, 2)]
    threes = [float(k[i, j] * ell[i, q]) for i, j, q in itertools.permutations(num, 3)]
    fours = [float(k[i, j] * ell[q, r]) for i, j, q, r in itertools.permutations(num, 4)]
    return mean(pairs) + mean(fours) - 2 * mean(threes)


@pytest.mark.parametrize("num", [4, 7])
def test_debiased_cka_is_that_of_the_u_statistic(num: int) -> None:
    x, y = rows(num, 3) + 1, rows(num, 5) - 2
    k, ell = x @ x.mT, y @ y.mT
    expected = u_statistic(k, ell) / math.sqrt(u_statistic(k, k) * u_statistic(ell, ell))
    assert reference.linear_cka(x, y).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_ignores_rotation_scale_and_shift(debiased: bool) -> None:
    x, y = related(12, 6, 9)
    value = reference.linear_cka(x, y, debiased=debiased).item()
    moved = reference.linear_cka(5 * x @ rotation(6) + 2, 0.1 * y @ rotation(9), debiased=debiased)
    assert moved.item() == pytest.approx(value, rel=1e-10)
    assert 0.1 < value < 0.999
    # but not a stretch of single directions
    stretched = reference.linear_cka(x * torch.arange(1, 7), y, debiased=debiased)
    assert abs(stretched.item() - value) > 1e-3


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_of_equal_arrangements_is_one(debiased: bool) -> None:
    x = rows(10, 6)
    wider = F.pad(7 * x, (0, 3)) @ rotation(9)
    assert reference.linear_cka(x, wider, debiased=debiased).item() == pytest.approx(1, rel=1e-13)


def test_only_the_debiased_cka_of_independent_features_is_zero() -> None:
    pairs = [(rows(32, 256), rows(32, 256)) for _ in range(40)]
    biased = [reference.linear_cka(*pair, debiased=False).item() for pair in pairs]
    debiased = torch.tensor([reference.linear_cka(*pair).item() for pair in pairs])
    assert min(biased) > 0.85
    assert abs(debiased.mean()) < 3 * debiased.std() / math.sqrt(len(pairs))
    assert debiased.abs().max() < 0.2


def test_a_small_batch_says_what_the_whole_set_says() -> None:
    x, y = related(2048, 64, 96, noise=4.0)
    whole = reference.linear_cka(x, y).item()
    parts = [
        reference.linear_cka(a, b).item() for a, b in zip(x.split(32), y.split(32), strict=True)
    ]
    assert sum(parts) / len(parts) == pytest.approx(whole, rel=0.05)
    biased = reference.linear_cka(x[:32], y[:32], debiased=False).item()
    assert abs(biased - whole) > 0.1


# the working version
@pytest.mark.parametrize(
    ("num", "width", "other"),
    [(4, 5, 3), (9, 16, 16), (16, 16, 16), (17, 3, 200), (50, 7, 7), (63, 40, 12), (64, 12, 40)],
)
def test_the_working_version_equals_the_oracle(num: int, width: int, other: int) -> None:
    x, y = related(num, width, other)
    expected = reference.linear_cka(unit(x), unit(y))
    torch.testing.assert_close(diagnostics.linear_cka(x, y), expected, rtol=1e-10, atol=1e-12)
    z = y @ rows(other, width)
    torch.testing.assert_close(
        diagnostics.mean_cosine(x, z), reference.mean_cosine(x, z), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num", "width"), [(64, 512), (512, 64)])
def test_any_dtype_is_computed_in_fp32_also_under_autocast(
    dtype: torch.dtype, num: int, width: int
) -> None:
    x, y = (z.to(dtype) for z in related(num, width, width, noise=2.0))
    truth = [reference.linear_cka(unit(x.double()), unit(y.double())).item()]
    truth += [reference.mean_cosine(x.double(), y.double()).item()]
    with torch.autocast("cpu", torch.bfloat16):
        found = [diagnostics.linear_cka(x, y), diagnostics.mean_cosine(x, y)]
    assert all(value.dtype == torch.float32 for value in found)
    assert [value.item() for value in found] == pytest.approx(truth, rel=2e-5, abs=1e-6)


def test_student_and_teacher_may_have_two_dtypes() -> None:
    x, y = related(9, 6, 6)
    for measure in (diagnostics.linear_cka, diagnostics.mean_cosine):
        exact = measure(x.bfloat16().double(), y.double())
        torch.testing.assert_close(measure(x.bfloat16(), y), exact, rtol=1e-12, atol=0)


def test_lengths_of_rows_do_not_matter() -> None:
    x, y = related(20, 8, 8)
    lengths = torch.rand(20, 1, dtype=torch.float64) + 0.5
    for measure in (diagnostics.linear_cka, diagnostics.mean_cosine):
        value = measure(x, y).item()
        assert measure(x * lengths, y / lengths).item() == pytest.approx(value, rel=1e-12)


def test_nearly_collapsed_rows_are_told_from_collapsed_ones() -> None:
    x, y = related(24, 16, 16)
    centre = rows(1, 16)
    near = (centre + 1e-3 * x).float()
    truth = reference.linear_cka(unit(near.double()), unit(y))
    found = diagnostics.linear_cka(near, y.float())
    assert found.item() == pytest.approx(truth.item(), rel=1e-3)
    assert math.isnan(diagnostics.linear_cka(centre.float().expand(24, -1), y).item())


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_too_few_rows_give_nan(num: int) -> None:
    x, y = rows(num, 8), rows(num, 5)
    assert math.isnan(diagnostics.linear_cka(x, y).item())
    assert math.isnan(reference.linear_cka(x, y).item())


def test_no_gradient_flows() -> None:
    x, y = (z.requires_grad_() for z in related(8, 4, 4))
    assert not diagnostics.linear_cka(x, y).requires_grad
    assert not diagnostics.mean_cosine(x, y).requires_grad


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of a result, and refuses to read a value on the host."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.parametrize(("num", "width", "other"), [(8, 64, 16), (40, 64, 16), (200, 64, 16)])
def test_nothing_large_is_formed_and_nothing_read(num: int, width: int, other: int) -> None:
    x, y = related(num, width, other)
    with Largest() as seen:
        diagnostics.linear_cka(x, y)
    assert seen.size <= max(num * num, width * other, num * width)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean_cosine: student is \(4, 3\) but teacher is \(4, 5"):
        diagnostics.mean_cosine(rows(4, 3), rows(4, 5))
    with pytest.raises(ValueError, match="mean_cosine: .* need one shape"):
        reference.mean_cosine(rows(4, 3), rows(4, 5))
    with pytest.raises(ValueError, match=r"linear_cka: .*the same rows, in the same order"):
        diagnostics.linear_cka(rows(4, 3), rows(5, 3))
