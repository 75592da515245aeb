# SPDX-License-Identifier: Apache-2.0
"""The oracle against TinyCLIP's affinity mimicking: soft cross-entropy, closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference

NUM_PAIRS = 6
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture
def problem() -> Problem:
    """Image, text and scale of the student; image, text and scale of a teacher of other width."""
    student = (unit_rows(NUM_PAIRS, 5), unit_rows(NUM_PAIRS, 5), torch.tensor(50.0).double())
    for tensor in student:
        tensor.requires_grad_()
    return (*student, unit_rows(NUM_PAIRS, 3), unit_rows(NUM_PAIRS, 3), 20.0)


def soft_cross_entropy(problem: Problem) -> Tensor:
    """The released loss: probabilities as targets of cross_entropy, both ways, halved."""
    image, text, scale, teacher_image, teacher_text, teacher_scale = problem
    student = scale * image @ text.T
    teacher = teacher_scale * teacher_image @ teacher_text.T
    by_rows = F.cross_entropy(student, teacher.softmax(1))
    return (by_rows + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def test_cross_entropy_and_kl_have_equal_gradients(problem: Problem) -> None:
    student = problem[:3]
    by_entropy = torch.autograd.grad(soft_cross_entropy(problem), student)
    by_kl = torch.autograd.grad(reference.contrastive_relational(*problem), student)
    for found, expected in zip(by_kl, by_entropy, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_cross_entropy_is_kl_plus_the_teachers_entropy(problem: Problem) -> None:
    image, text, scale, teacher_image, teacher_text, teacher_scale = problem
    terms = reference.similarity_terms(
        image,
        text,
        scale,
        teacher_query=teacher_image,
        teacher_key=teacher_text,
        teacher_scale=teacher_scale,
    )
    entropy = (terms.teacher_entropy_rows + terms.teacher_entropy_cols) / 2
    found = reference.contrastive_relational(*problem) + entropy
    assert entropy.item() > 0.01
    assert found.item() == pytest.approx(soft_cross_entropy(problem).item(), rel=1e-13)


def test_value_has_its_closed_form(problem: Problem) -> None:
    # 1/(2B) (sum of row and column log-sum-exps - sum of S against both teacher affinities)
    image, text, scale, teacher_image, teacher_text, teacher_scale = problem
    student = scale * image @ text.T
    teacher = teacher_scale * teacher_image @ teacher_text.T
    lse = reference.similarity_lse(image, text, scale) + reference.similarity_lse(
        text, image, scale
    )
    targets = teacher.softmax(1) + teacher.softmax(0)
    closed = (lse.sum() - (student * targets).sum()) / (2 * NUM_PAIRS)
    assert soft_cross_entropy(problem).item() == pytest.approx(closed.item(), rel=1e-12)


def test_gradients_have_their_closed_form(problem: Problem) -> None:
    found = torch.autograd.grad(reference.contrastive_relational(*problem), problem[:3])
    image, text, scale = (x.detach() for x in problem[:3])
    student = scale * image @ text.T
    teacher = problem[5] * problem[3] @ problem[4].T
    by_rows = student.softmax(1) - teacher.softmax(1)
    by_cols = student.softmax(0) - teacher.softmax(0)
    logits_grad = (by_rows + by_cols) / (2 * NUM_PAIRS)
    expected = (
        scale * logits_grad @ text,
        scale * logits_grad.T @ image,
        (logits_grad * (image @ text.T)).sum(),
    )
    for ours, closed in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, closed, rtol=1e-11, atol=1e-13)


def test_mixing_targets_mixes_the_losses(problem: Problem) -> None:
    # the target 0.8 teacher + 0.2 identity equals 0.8 soft + 0.2 hard, up to a constant
    image, text, scale, *_ = problem
    student = scale * image @ text.T
    teacher = problem[5] * problem[3] @ problem[4].T
    eye = torch.eye(NUM_PAIRS, dtype=torch.float64)
    mixed = sum(
        F.cross_entropy(a, 0.8 * b.softmax(1) + 0.2 * eye)
        for a, b in ((student, teacher), (student.T, teacher.T))
    )
    apart = 0.8 * reference.contrastive_relational(*problem) + 0.2 * reference.info_nce(
        image, text, scale
    )
    for ours, expected in zip(
        torch.autograd.grad(apart, problem[:3]),
        torch.autograd.grad(mixed / 2, problem[:3]),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
