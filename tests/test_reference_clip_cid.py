# SPDX-License-Identifier: Apache-2.0
"""The oracle against CLIP-CID's cluster losses: gradients, streaming KL, margin, sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference

NUM_IMAGES, NUM_CENTROIDS = 4, 9


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.fixture
def student() -> tuple[Tensor, Tensor, Tensor]:
    """Images, centroids and scale, all wanting gradients."""
    scale = torch.tensor(32.0, dtype=torch.float64)
    tensors = (unit_rows(NUM_IMAGES, 5), unit_rows(NUM_CENTROIDS, 5), scale)
    for tensor in tensors:
        tensor.requires_grad_()
    return tensors


@pytest.fixture
def teacher() -> tuple[Tensor, Tensor, float]:
    """Images, centroids and scale of a teacher of another width."""
    return unit_rows(NUM_IMAGES, 7), unit_rows(NUM_CENTROIDS, 7), 24.0


@pytest.fixture
def labels() -> Tensor:
    """Two images share a cluster."""
    return torch.tensor([8, 2, 2, 0])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_have_their_closed_form(
    student: tuple, teacher: tuple, labels: Tensor, temperature: float
) -> None:
    weight = 0.6
    loss = reference.cluster_cross_entropy(*student, labels) + weight * reference.cluster_kl(
        *student, *teacher, temperature=temperature
    )
    found = torch.autograd.grad(loss, student)
    image, centroids, scale = (x.detach() for x in student)
    logits, targets = scale * image @ centroids.T, teacher[2] * teacher[0] @ teacher[1].T
    hard = logits.softmax(1) - F.one_hot(labels, NUM_CENTROIDS)
    soft = (logits / temperature).softmax(1) - (targets / temperature).softmax(1)
    logits_grad = (hard + weight * temperature * soft) / NUM_IMAGES
    assert_equal(found[0], scale * logits_grad @ centroids)
    assert_equal(found[1], scale * logits_grad.T @ image)
    assert_equal(found[2], (logits_grad * (image @ centroids.T)).sum())


@pytest.mark.parametrize("tile", [1, 2, 4, 9])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_streams_over_tiles_of_centroids(
    student: tuple, teacher: tuple, temperature: float, tile: int
) -> None:
    s = (student[2] * student[0] @ student[1].T).detach() / temperature
    t = teacher[2] * teacher[0] @ teacher[1].T / temperature
    m_s = m_t = torch.full((NUM_IMAGES,), -math.inf, dtype=torch.float64)
    l_s = l_t = a = torch.zeros(NUM_IMAGES, dtype=torch.float64)
    for s_tile, t_tile in zip(s.split(tile, 1), t.split(tile, 1), strict=True):
        m_s_new, m_t_new = (torch.maximum(m, x.amax(1)) for m, x in ((m_s, s_tile), (m_t, t_tile)))
        p, q = (s_tile - m_s_new[:, None]).exp(), (t_tile - m_t_new[:, None]).exp()
        l_s = l_s * (m_s - m_s_new).exp() + p.sum(1)
        l_t = l_t * (m_t - m_t_new).exp() + q.sum(1)
        a = a * (m_t - m_t_new).exp() + (q * (t_tile - s_tile)).sum(1)
        m_s, m_t = m_s_new, m_t_new
    streamed = (a / l_t - (m_t + l_t.log()) + (m_s + l_s.log())).mean() * temperature**2
    dense = reference.cluster_kl(*student, *teacher, temperature=temperature)
    assert dense.item() == pytest.approx(streamed.item(), rel=1e-13)


def test_kl_is_a_sum_over_centroids_and_a_mean_over_images(student: tuple, teacher: tuple) -> None:
    log_p = (student[2] * student[0] @ student[1].T).log_softmax(1)
    q = (teacher[2] * teacher[0] @ teacher[1].T).softmax(1)
    expected = F.kl_div(log_p, q, reduction="batchmean")
    assert reference.cluster_kl(*student, *teacher).item() == pytest.approx(expected.item(), 1e-12)


def test_kl_is_zero_exactly_when_student_is_teacher(student: tuple, teacher: tuple) -> None:
    assert reference.cluster_kl(*student, *student).item() == pytest.approx(0, abs=1e-14)
    assert reference.cluster_kl(*student, *teacher).item() > 0.1


def test_margin_multiplies_the_target_gradient_by_its_exact_jacobian(labels: Tensor) -> None:
    # one centroid an axis makes the image's gradient the gradient of its cosines
    margin, scale = 0.3, 16.0
    cosines = (0.9 * unit_rows(NUM_IMAGES, NUM_CENTROIDS)).requires_grad_()
    axes = torch.eye(NUM_CENTROIDS, dtype=torch.float64)
    reference.cluster_cross_entropy(cosines, axes, scale, labels, margin).backward()
    hot = F.one_hot(labels, NUM_CENTROIDS).double()
    theta = cosines.detach().acos()
    logits = scale * (theta + margin * hot).cos()
    plain = scale * (logits.softmax(1) - hot) / NUM_IMAGES
    jacobian = torch.where(hot.bool(), (theta + margin).sin() / theta.sin(), 1.0)
    assert_equal(cosines.grad, plain * jacobian)
    assert (jacobian - 1).abs().max() > 0.05


def test_margin_makes_the_loss_of_arcface(student: tuple, labels: Tensor) -> None:
    image, centroids, scale = student
    theta = (image @ centroids.T).acos()
    logits = scale * (theta + 0.3 * F.one_hot(labels, NUM_CENTROIDS).double()).cos()
    loss = reference.cluster_cross_entropy(*student, labels, margin=0.3)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)


def test_no_margin_is_plain_cross_entropy(student: tuple, labels: Tensor) -> None:
    expected = F.cross_entropy(student[2] * student[0] @ student[1].T, labels)
    loss = reference.cluster_cross_entropy(*student, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_sampling_every_centroid_is_the_dense_loss(
    student: tuple, teacher: tuple, labels: Tensor, margin: float
) -> None:
    sample = torch.randperm(NUM_CENTROIDS)
    positions = sample.argsort()[labels]
    image, centroids, scale = student
    dense = reference.cluster_cross_entropy(*student, labels, margin)
    sampled = reference.cluster_cross_entropy(image, centroids[sample], scale, positions, margin)
    assert sampled.item() == pytest.approx(dense.item(), rel=1e-13)
    teacher_sampled = (teacher[0], teacher[1][sample], teacher[2])
    kl = reference.cluster_kl(image, centroids[sample], scale, *teacher_sampled)
    assert kl.item() == pytest.approx(reference.cluster_kl(*student, *teacher).item(), rel=1e-12)


def test_sampling_fewer_negatives_lowers_the_loss(student: tuple, labels: Tensor) -> None:
    sample = torch.tensor([0, 2, 8, 5])
    positions = torch.tensor([2, 1, 1, 0])
    image, centroids, scale = student
    sampled = reference.cluster_cross_entropy(image, centroids[sample], scale, positions)
    assert sampled.item() < reference.cluster_cross_entropy(*student, labels).item() - 1e-6


def test_instance_loss_is_half_of_both_divergences(teacher: tuple) -> None:
    image, text, teacher_text = unit_rows(4, 5), unit_rows(4, 5), unit_rows(4, 7)
    student = (image, text, 20.0)
    teachers = (teacher[0], teacher_text, 24.0)
    both = reference.logit_kl(*student, *teachers) + reference.logit_kl(
        text, image, 20.0, teacher_text, teacher[0], 24.0
    )
    loss = reference.contrastive_relational(*student, *teachers)
    assert loss.item() == pytest.approx(both.item() / 2, rel=1e-13)
