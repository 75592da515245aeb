# SPDX-License-Identifier: Apache-2.0
"""The oracle against CLIP-KD: values at initialisation and closed-form gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference

NUM_PAIRS, WIDTH = 7, 5


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.abs().max())


@pytest.fixture
def batch() -> SimpleNamespace:
    """Student embeddings and scales that want gradients, teacher constants of the same width."""
    names = ("image", "text", "teacher_image", "teacher_text")
    tensors = {name: unit_rows(NUM_PAIRS, WIDTH) for name in names}
    tensors["scale"] = torch.tensor(8.0, dtype=torch.float64)
    tensors["interactive_scale"] = torch.tensor(5.0, dtype=torch.float64)
    for name in ("image", "text", "scale", "interactive_scale"):
        tensors[name].requires_grad_()
    return SimpleNamespace(**tensors, teacher_scale=12.0)


class TestValuesAtInitialisation:
    """Random unit embeddings of width 512, 1024 pairs."""

    def test_feature_distillation_of_both_modalities_is_4_over_the_width(self) -> None:
        image, text, teacher_image, teacher_text = unit_rows(4, 1024, 512)
        loss = reference.feature(image, teacher_image) + reference.feature(text, teacher_text)
        assert loss.item() == pytest.approx(4 / 512, rel=0.01)
        assert 2000 * loss.item() == pytest.approx(15.6, abs=0.2)

    def test_feature_distillation_is_the_cosine_distance(self) -> None:
        student, teacher = unit_rows(2, 1024, 512)
        cosine = F.cosine_similarity(student, teacher).mean()
        loss = reference.feature(student, teacher, reduction="sum")
        assert loss.item() == pytest.approx(2 * (1 - cosine.item()), rel=1e-12)

    def test_paper_form_is_the_mean_times_the_width(self) -> None:
        student, teacher = unit_rows(2, 64, 512)
        mean, paper = (reference.feature(student, teacher, reduction=r) for r in ("mean", "sum"))
        assert 2000 * mean.item() == pytest.approx(2000 / 512 * paper.item(), rel=1e-12)

    def test_info_nce_is_log_batch_plus_half_the_logit_variance(self) -> None:
        scale = 1 / 0.07
        loss = reference.info_nce(*unit_rows(2, 1024, 512), scale).item()
        # 7.13; the mean positive alone spreads by scale / sqrt(512 * 1024) = 0.02
        assert loss == pytest.approx(math.log(1024) + scale**2 / (2 * 512), abs=0.08)

    def test_interactive_contrastive_with_the_raw_scale_is_log_batch(self) -> None:
        image, text, teacher_image, teacher_text = unit_rows(4, 1024, 512)
        raw = math.log(1 / 0.07)
        loss = reference.interactive_contrastive(image, text, raw, teacher_image, teacher_text)
        assert loss.item() == pytest.approx(math.log(1024), abs=0.02)


class TestContrastiveRelational:
    def test_is_zero_for_the_teachers_own_logits(self, batch: SimpleNamespace) -> None:
        # another width and scale with the same logits: 12 u.v = 3 (2u).(2v)
        teacher = torch.cat([batch.image, batch.image], 1), torch.cat([batch.text, batch.text], 1)
        loss = reference.contrastive_relational(
            batch.image, batch.text, batch.scale, *teacher, batch.scale / 2
        )
        assert loss.item() == pytest.approx(0, abs=1e-14)

    def test_rows_and_columns_forgive_exactly_their_own_constants(self) -> None:
        eye = torch.eye(5, dtype=torch.float64)
        logits, by_row = torch.randn(2, 5, 5, dtype=torch.float64)
        by_row = by_row[:, :1].expand(5, 5)

        def terms(teacher_logits: Tensor) -> reference.SimilarityTerms:
            return reference.similarity_terms(
                logits, eye, 1.0, teacher_query=teacher_logits, teacher_key=eye, teacher_scale=1.0
            )

        per_row, per_column = terms(logits + by_row), terms(logits + by_row.T)
        assert per_row.soft_rows.item() == pytest.approx(0, abs=1e-14)
        assert per_row.soft_cols.item() > 1e-2
        assert per_column.soft_cols.item() == pytest.approx(0, abs=1e-14)
        assert per_column.soft_rows.item() > 1e-2

    def test_is_positive_for_any_other_logits(self, batch: SimpleNamespace) -> None:
        nudged = batch.image.detach().clone()
        nudged[0] += 1e-3 * nudged[1]
        args = (batch.image, batch.text, batch.scale, nudged, batch.text, batch.scale)
        assert reference.contrastive_relational(*args).item() > 1e-9

    def test_is_half_of_the_papers_sum_of_kl_divergences(self, batch: SimpleNamespace) -> None:
        student = batch.scale * batch.image @ batch.text.T
        teacher = batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T
        paper = sum(
            F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
            for a, b in ((student, teacher), (student.T, teacher.T))
        )
        loss = reference.contrastive_relational(
            batch.image,
            batch.text,
            batch.scale,
            batch.teacher_image,
            batch.teacher_text,
            batch.teacher_scale,
        )
        assert loss.item() == pytest.approx(paper.item() / 2, rel=1e-12)


class TestGradientDistillation:
    def gradients(self, batch: SimpleNamespace) -> dict[str, Tensor]:
        """G, P, Q, g_image, g_text of the student and the upstream U, R, written out."""
        scale, image, text = (x.detach() for x in (batch.scale, batch.image, batch.text))
        eye = torch.eye(NUM_PAIRS, dtype=torch.float64)
        logits = scale * image @ text.T
        p, q = logits.softmax(1), logits.T.softmax(1)
        g = ((p - eye) + (q - eye).T) / 2
        student = scale / NUM_PAIRS * g @ text, scale / NUM_PAIRS * g.T @ image
        teacher = reference.info_nce_gradients(
            batch.teacher_image, batch.teacher_text, batch.teacher_scale
        )
        u, r = (2 * (a - b) / a.numel() for a, b in zip(student, teacher, strict=True))
        return {"p": p, "q": q, "g": g, "u": u, "r": r}

    def test_closed_form_is_autograd_of_info_nce(self, batch: SimpleNamespace) -> None:
        loss = reference.info_nce(batch.image, batch.text, batch.scale)
        expected = torch.autograd.grad(loss, (batch.image, batch.text))
        found = reference.info_nce_gradients(batch.image, batch.text, batch.scale)
        assert_equal(found[0], expected[0])
        assert_equal(found[1], expected[1])

    def test_loss_is_two_mean_squared_errors_of_autograd_gradients(
        self, batch: SimpleNamespace
    ) -> None:
        def gradients(image: Tensor, text: Tensor, scale: Tensor | float) -> tuple[Tensor, ...]:
            image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
            return torch.autograd.grad(reference.info_nce(image, text, scale), (image, text))

        student = gradients(batch.image, batch.text, batch.scale)
        teacher = (batch.teacher_image, batch.teacher_text, batch.teacher_scale)
        expected = sum(map(F.mse_loss, student, gradients(*teacher)))
        found = reference.gradient(batch.image, batch.text, batch.scale, *teacher)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_backward_has_its_closed_form(self, batch: SimpleNamespace) -> None:
        reference.gradient(
            batch.image,
            batch.text,
            batch.scale,
            batch.teacher_image,
            batch.teacher_text,
            batch.teacher_scale,
        ).backward()
        p, q, g, u, r = self.gradients(batch).values()
        image, text, scale = batch.image.detach(), batch.text.detach(), batch.scale.detach()
        rate = scale / NUM_PAIRS
        h = rate * (u @ text.T + image @ r.T)
        by_rows = p * (h - (p * h).sum(1, keepdim=True)) / 2
        by_cols = q * (h.T - (q * h.T).sum(1, keepdim=True)) / 2
        logits_grad = by_rows + by_cols.T
        assert_equal(batch.image.grad, rate * g @ r + scale * logits_grad @ text)
        assert_equal(batch.text.grad, rate * g.T @ u + scale * logits_grad.T @ image)
        direct = ((u * (g @ text)).sum() + (r * (g.T @ image)).sum()) / NUM_PAIRS
        assert_equal(batch.scale.grad, (logits_grad * (image @ text.T)).sum() + direct)

    def test_is_zero_for_the_teachers_own_embeddings(self, batch: SimpleNamespace) -> None:
        student = (batch.image, batch.text, batch.scale)
        assert reference.gradient(*student, *student).item() == 0

    def test_falls_with_the_square_of_the_batch(self) -> None:
        def loss(num_pairs: int) -> float:
            image, text, teacher_image, teacher_text = unit_rows(4, num_pairs, 256)
            return reference.gradient(image, text, 10.0, teacher_image, teacher_text, 10.0).item()

        assert loss(128) / loss(512) == pytest.approx(16, rel=0.1)


class TestRecipe:
    """L_CLIP + a CRD + b FD + c ICL in one width, with every weight another number."""

    relational, features, interactive = 0.7, 2000.0, 1.3

    def loss(self, batch: SimpleNamespace) -> Tensor:
        student = (batch.image, batch.text, batch.scale)
        teacher = (batch.teacher_image, batch.teacher_text)
        return (
            reference.info_nce(*student)
            + self.relational
            * reference.contrastive_relational(*student, *teacher, batch.teacher_scale)
            + self.features * reference.feature(batch.image, batch.teacher_image)
            + self.features * reference.feature(batch.text, batch.teacher_text)
            + self.interactive
            * reference.interactive_contrastive(
                batch.image, batch.text, batch.interactive_scale, *teacher
            )
        )

    def test_gradients_have_their_closed_form(self, batch: SimpleNamespace) -> None:
        self.loss(batch).backward()
        image, text, scale = batch.image.detach(), batch.text.detach(), batch.scale.detach()
        interactive_scale = batch.interactive_scale.detach()
        eye = torch.eye(NUM_PAIRS, dtype=torch.float64)
        student = scale * image @ text.T
        teacher = batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T

        def both(logits: Tensor) -> Tensor:
            return logits.softmax(1) + logits.softmax(0)

        def cross(anchor: Tensor, candidates: Tensor) -> Tensor:
            residual = (interactive_scale * anchor @ candidates.T).softmax(1) - eye
            return self.interactive / (2 * NUM_PAIRS) * residual

        m = (1 + self.relational) * both(student) - 2 * eye - self.relational * both(teacher)
        m = m / (2 * NUM_PAIRS)
        e1, e2 = cross(image, batch.teacher_text), cross(text, batch.teacher_image)
        rate = 2 * self.features / (NUM_PAIRS * WIDTH)
        assert_equal(
            batch.image.grad,
            scale * m @ text
            + interactive_scale * e1 @ batch.teacher_text
            + rate * (image - batch.teacher_image),
        )
        assert_equal(
            batch.text.grad,
            scale * m.T @ image
            + interactive_scale * e2 @ batch.teacher_image
            + rate * (text - batch.teacher_text),
        )
        assert_equal(batch.scale.grad, (m * (image @ text.T)).sum())
        assert_equal(
            batch.interactive_scale.grad,
            (e1 * (image @ batch.teacher_text.T)).sum()
            + (e2 * (text @ batch.teacher_image.T)).sum(),
        )

    def test_one_sweep_of_info_nce_and_relational_is_their_sum(
        self, batch: SimpleNamespace
    ) -> None:
        student = (batch.image, batch.text, batch.scale)
        teacher = (batch.teacher_image, batch.teacher_text, batch.teacher_scale)
        apart = reference.info_nce(*student) + 0.7 * reference.contrastive_relational(
            *student, *teacher
        )
        together = reference.similarity_loss(
            *student,
            teacher_query=teacher[0],
            teacher_key=teacher[1],
            teacher_scale=teacher[2],
            soft_rows=0.35,
            soft_cols=0.35,
        )
        assert together.item() == pytest.approx(apart.item(), rel=1e-13)

    def test_augmented_feature_is_info_nce_of_fused_embeddings(
        self, batch: SimpleNamespace
    ) -> None:
        # another teacher width than the student's, with torch's own linear layers
        teacher_image, teacher_text = unit_rows(2, NUM_PAIRS, 3)
        fuse_image, fuse_text = (
            torch.nn.Linear(WIDTH + 3, WIDTH, dtype=torch.float64) for _ in range(2)
        )
        loss = reference.augmented_feature(
            batch.image, batch.text, 9.0, teacher_image, teacher_text, fuse_image, fuse_text
        )
        fused = [
            F.normalize(layer(torch.cat(halves, 1)), dim=1)
            for layer, halves in (
                (fuse_image, [batch.image, teacher_image]),
                (fuse_text, [batch.text, teacher_text]),
            )
        ]
        logits, diagonal = 9.0 * fused[0] @ fused[1].T, torch.arange(NUM_PAIRS)
        expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in fuse_image.parameters())
