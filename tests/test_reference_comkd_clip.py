# SPDX-License-Identifier: Apache-2.0
"""The oracle against ComKD-CLIP: moment alignment and the distillation of zero-shot logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference

BATCH, WIDTH = 8, 6


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_alignment_gradient_has_its_closed_form() -> None:
    student, teacher = unit_rows(BATCH, WIDTH).requires_grad_(), unit_rows(BATCH, WIDTH)
    reference.moment_alignment(student, teacher).backward()
    u = student.detach()
    means = u.mean(0) - teacher.mean(0)
    variances = u.var(0, correction=0) - teacher.var(0, correction=0)
    expected = (means.sign() + 2 * (u - u.mean(0)) * variances.sign()) / (WIDTH * BATCH)
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-15)


def test_alignment_ignores_which_row_is_which() -> None:
    student, teacher = unit_rows(BATCH, WIDTH), unit_rows(BATCH, WIDTH)
    value = reference.moment_alignment(student, teacher).item()
    permuted = reference.moment_alignment(student[torch.randperm(BATCH)], teacher).item()
    assert permuted == pytest.approx(value, rel=1e-13)
    assert value > 0.01


def test_alignment_is_zero_for_other_rows_with_equal_moments() -> None:
    teacher = unit_rows(BATCH, WIDTH)
    # mirrored about the mean: every row moves, mean and variance stay
    student = 2 * teacher.mean(0) - teacher
    assert reference.moment_alignment(student, teacher).item() == pytest.approx(0, abs=1e-15)
    assert (student - teacher).abs().max() > 0.1


def test_alignment_sees_a_shift_of_the_mean_alone() -> None:
    teacher = unit_rows(BATCH, WIDTH)
    shift = torch.zeros(WIDTH, dtype=torch.float64)
    shift[2] = -0.3
    loss = reference.moment_alignment(teacher + shift, teacher)
    assert loss.item() == pytest.approx(0.3 / WIDTH, rel=1e-12)


def test_alignment_sees_a_change_of_the_variance_alone() -> None:
    teacher = unit_rows(BATCH, WIDTH)
    mean = teacher.mean(0)
    loss = reference.moment_alignment(mean + 1.5 * (teacher - mean), teacher)
    expected = (1.5**2 - 1) * teacher.var(0, correction=0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("num_classes", [10, 100, 397])
def test_promptkd_arithmetic_is_the_loss_with_weight_1000_over_the_classes(
    num_classes: int,
) -> None:
    image, teacher_image, text = unit_rows(BATCH, 6), unit_rows(BATCH, 6), unit_rows(num_classes, 6)
    student, teacher = 100.0 * image @ text.T, 50.0 * teacher_image @ text.T
    promptkd = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum")
    promptkd = 1000 * promptkd / student.numel()
    loss = reference.logit_kl(image, text, 100.0, teacher_image, text, 50.0)
    assert 1000 / num_classes * loss.item() == pytest.approx(promptkd.item(), rel=1e-12)


def test_row_weight_does_not_depend_on_the_number_of_classes() -> None:
    # classes that nobody picks change nothing: the loss is a sum over classes, not a mean
    image, teacher_image, text = unit_rows(BATCH, 3), unit_rows(BATCH, 3), unit_rows(5, 3)

    def widened(rows: Tensor, value: float) -> Tensor:
        return torch.cat([rows, torch.full((len(rows), 1), value, dtype=torch.float64)], 1)

    few = reference.logit_kl(image, text, 4.0, teacher_image, text, 6.0)
    absurd = torch.zeros(40, 4, dtype=torch.float64)
    absurd[:, 3] = -50.0
    more_text = torch.cat([widened(text, 0.0), absurd])
    many = reference.logit_kl(
        widened(image, 1.0), more_text, 4.0, widened(teacher_image, 1.0), more_text, 6.0
    )
    assert many.item() == pytest.approx(few.item(), rel=1e-13)


def test_loss_does_not_depend_on_the_order_of_classes() -> None:
    image, teacher_image, text = unit_rows(BATCH, 6), unit_rows(BATCH, 6), unit_rows(9, 6)
    order = torch.randperm(9)
    value = reference.logit_kl(image, text, 30.0, teacher_image, text, 20.0).item()
    permuted = reference.logit_kl(image, text[order], 30.0, teacher_image, text[order], 20.0)
    assert permuted.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_hinton_temperature_divides_both_logits_and_multiplies_the_loss_by_its_square(
    temperature: float,
) -> None:
    image, teacher_image, text = unit_rows(BATCH, 6), unit_rows(BATCH, 6), unit_rows(9, 6)
    student, teacher = 30.0 * image @ text.T, 20.0 * teacher_image @ text.T
    expected = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).softmax(1),
        reduction="batchmean",
    )
    loss = reference.logit_kl(image, text, 30.0, teacher_image, text, 20.0, temperature=temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
