# SPDX-License-Identifier: Apache-2.0
"""The methods against formulas written out here from the papers and the released code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdengine.methods.clip_kd as clip_kd_module
import kdengine.methods.relational as relational_module
from kdengine import config
from kdengine.methods import Clip, ClipKD, Distillation, build_method, needs_teacher
from kdengine.models import Features


def features(width: int, batch: int = 6, scale: float = 12.0, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return Features(image, text, torch.tensor([scale], dtype=torch.float64))


def leaves(values: Features) -> Features:
    return Features(*(value.clone().requires_grad_() for value in values))


def extra_terms(
    student: Features, teacher: Features, scale: Tensor, heads: Any, fusions: Any
) -> dict[str, Tensor]:
    """GD with autograd for the inner gradients, and AFD, written out plainly."""
    u, v = (F.normalize(value, dim=-1) for value in teacher[:2])

    def clip(x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        logits, label = multiplier * x @ y.T, torch.arange(len(x))
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2

    def inner(x: Tensor, y: Tensor, multiplier: Tensor, keep: bool) -> tuple[Tensor, ...]:
        x, y = (z if z.requires_grad else z.requires_grad_() for z in (x, y))
        return torch.autograd.grad(clip(x, y, multiplier), (x, y), create_graph=keep)

    hats = [F.normalize(head(z), dim=-1) for head, z in zip(heads, student[:2], strict=True)]
    ours, theirs = inner(*hats, student.scale, True), inner(u, v, teacher.scale, False)
    fused = [
        F.normalize(fusion(torch.cat([F.normalize(z, dim=-1), w.detach()], 1)), dim=-1)
        for fusion, z, w in zip(fusions, student[:2], (u, v), strict=True)
    ]
    return {
        "gd": sum(F.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)),
        "afd": clip(*fused, scale),
    }


@pytest.mark.parametrize("teacher_width", [8, 5], ids=["equal", "unequal"])
def test_gd_and_afd_equal_autograd_with_all_gradients(teacher_width: int) -> None:
    weights = {"task": 0.0, "crd": 0.0, "fd": 0.0, "icl": 0.0, "gd": 1e3, "afd": 0.7}
    method = ClipKD(8, [teacher_width], **weights).double()
    student, teacher = leaves(features(8)), features(teacher_width, scale=30.0, seed=1)
    terms = method(student, [teacher])
    heads = (method.image_head, method.text_head)
    fusions = (method.image_fusion, method.text_fusion)
    scale = method.fused_log_scale.exp()
    expected = extra_terms(student, teacher, scale, heads, fusions)
    total = sum(weight * terms[name] for name, weight in method.weights.items())
    truth = sum(weight * expected[name] for name, weight in method.weights.items())
    inputs = [*student, *method.parameters()]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=1e-14)
    found = torch.autograd.grad(total, inputs)
    for got, want in zip(found, torch.autograd.grad(truth, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def plain_terms(
    student: Features, teacher: Features, icl_scale: Tensor, heads: Any
) -> dict[str, Tensor]:
    """CLIP-KD's terms in the released code's reductions, which ours are, written out plainly."""
    x, y = (F.normalize(value, dim=-1) for value in student[:2])
    u, v = (F.normalize(value, dim=-1) for value in teacher[:2])
    x_hat = F.normalize(heads[0](student.image), dim=-1)
    y_hat = F.normalize(heads[1](student.text), dim=-1)
    label = torch.arange(len(x))
    logits, targets = student.scale * x @ y.T, teacher.scale * u @ v.T

    def kl(target: Tensor, logit: Tensor) -> Tensor:
        return F.kl_div(logit.log_softmax(-1), target.softmax(-1), reduction="batchmean")

    def ce(matrix: Tensor) -> Tensor:
        return F.cross_entropy(matrix, label)

    return {
        "task": (ce(logits) + ce(logits.T)) / 2,
        "crd": (kl(targets, logits) + kl(targets.T, logits.T)) / 2,
        "fd": F.mse_loss(x_hat, u) + F.mse_loss(y_hat, v),
        "icl": (ce(icl_scale * x_hat @ v.T) + ce(icl_scale * y_hat @ u.T)) / 2,
    }


@pytest.mark.parametrize("teacher_width", [8, 5], ids=["equal", "unequal"])
def test_clip_kd_equals_its_formulas_with_all_gradients(teacher_width: int) -> None:
    method = ClipKD(8, [teacher_width]).double()
    student, teacher = leaves(features(8)), features(teacher_width, scale=30.0, seed=1)
    terms = method(student, [teacher])
    heads = (method.image_head, method.text_head)
    expected = plain_terms(student, teacher, method.log_scale.exp(), heads)
    inputs = [*student, *method.parameters()]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-9)
    total = sum(weight * terms[name] for name, weight in method.weights.items())
    truth = sum(weight * expected[name] for name, weight in method.weights.items())
    found = torch.autograd.grad(total, inputs)
    for got, want in zip(found, torch.autograd.grad(truth, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_the_interactive_scale_starts_as_the_paper_or_the_code_has_it() -> None:
    assert ClipKD(8, [8]).interactive_scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    quirky = ClipKD(8, [8], reference_quirks=True)
    assert quirky.interactive_scale().item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    assert quirky.log_scales() == [] and len(ClipKD(8, [8]).log_scales()) == 1


@pytest.mark.parametrize("name", ["task", "crd", "fd", "icl"])
def test_a_term_of_weight_zero_is_never_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"task": 1.0, "crd": 1.0, "fd": 2000.0, "icl": 1.0, name: 0.0}
    method = ClipKD(8, [5], **weights).double()
    calls: list[dict[str, Any]] = []

    def spy(function: str) -> None:
        module = relational_module if function == "similarity_terms" else clip_kd_module
        real = getattr(module, function)

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append({"function": function, **kwargs})
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, called)

    for function in ("similarity_terms", "unit_feature", "interactive_contrastive"):
        spy(function)
    terms = method(features(8), [features(5, seed=1)])
    assert name not in terms and name not in method.weights
    names = [call["function"] for call in calls]
    assert ("unit_feature" in names) == (name != "fd")
    assert ("interactive_contrastive" in names) == (name != "icl")
    (relational,) = [call for call in calls if call["function"] == "similarity_terms"]
    assert (relational["teacher_query"] is not None) == (name != "crd")


@pytest.mark.parametrize(
    ("weights", "width", "heads", "scales"),
    [
        ({}, 8, False, 1),
        ({}, 5, True, 1),
        ({"fd": 0.0, "icl": 0.0}, 5, False, 0),
        ({"icl": 0.0}, 5, True, 0),
        ({"fd": 0.0, "icl": 0.0, "gd": 1.0}, 5, True, 0),
    ],
    ids=["equal-width", "unequal-width", "nothing-to-compare", "no-icl", "gradients"],
)
def test_only_needed_heads_and_scales_are_created(
    weights: dict[str, float], width: int, heads: bool, scales: int
) -> None:
    method = ClipKD(8, [width], **weights)
    names = {name for name, _ in method.named_parameters()}
    assert ("image_head.weight" in names) == heads
    assert ("log_scale" in names) == bool(scales)


def test_a_teacher_that_wants_a_gradient_is_refused() -> None:
    teacher = leaves(features(5, seed=1))
    with pytest.raises(ValueError, match="requires a gradient; run the teacher under"):
        ClipKD(8, [5]).double()(leaves(features(8)), [teacher])


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="every weight is 0"):
        ClipKD(8, [8], task=0, crd=0, fd=0, icl=0)


def test_clip_is_info_nce_alone() -> None:
    student = features(8)
    expected = plain_terms(student, features(8), torch.tensor(1.0), (nn.Identity(),) * 2)
    torch.testing.assert_close(Clip()(student, ())["task"], expected["task"])


class _Tower(nn.Module):
    """Stands in for a student: one matrix for both modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.weight = nn.Parameter(torch.eye(8, dtype=torch.float64) * 0.5)

    def forward(self, image: Tensor, tokens: Tensor, mask_ratio: float = 0.0) -> Features:
        return Features(image @ self.weight, tokens @ self.weight, self.log_scale.exp())


def test_the_root_module_weights_terms_and_logs_them_unweighted() -> None:
    root = Distillation(_Tower(), ClipKD(8, [5]).double())  # type: ignore[arg-type]
    pair, teacher = features(8), features(5, seed=1)
    loss, logged = root(pair.image, pair.text, [teacher])
    expected = sum(w * logged[name] for name, w in root.method.weights.items())
    torch.testing.assert_close(loss.detach(), expected)
    assert set(logged) == {"task", "crd", "fd", "icl", "scale", "icl_scale"}
    assert not any(value.requires_grad for value in logged.values())
    assert len(root.log_scales()) == 2


def test_a_missing_teacher_is_refused_with_its_mend() -> None:
    root = Distillation(_Tower(), ClipKD(8, [5]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--distill.distill-model"):
        root(features(8).image, features(8).text)
    with pytest.raises(ValueError, match="expected a teacher"):
        build_method(config.Method(name="clip_kd"), student_width=8, teacher_widths=())


def test_build_method_passes_the_configured_weights() -> None:
    settings = config.Method(name="clip_kd", clip_kd=config.ClipKD(fd=0.0, crd=3.0))
    method = build_method(settings, student_width=8, teacher_widths=[5])
    assert method.weights == {"task": 1.0, "crd": 3.0, "icl": 1.0}
    names = ("clip_kd", "clip")
    assert [needs_teacher(config.Method(name=name)) for name in names] == [True, False]
    assert isinstance(
        build_method(config.Method(name="clip"), student_width=8, teacher_widths=()), Clip
    )


def _rank_gradients(rank: int, world_size: int, width: int) -> tuple[Tensor, list[Tensor]]:
    group = torch.distributed.group.WORLD if world_size > 1 else None
    method = ClipKD(8, [width], gd=1e3, afd=0.5, group=group).double()
    root = Distillation(_Tower(), method)  # type: ignore[arg-type]
    rows = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    pair, teacher = features(8), features(width, scale=30.0, seed=1)
    own = Features(teacher.image[rows], teacher.text[rows], teacher.scale)
    loss, _ = root(pair.image[rows], pair.text[rows], [own])
    loss.backward()
    gradients = [p.grad for p in root.parameters() if p.grad is not None]
    for value in (loss.detach(), *gradients):
        if world_size > 1:
            torch.distributed.all_reduce(value)
        value /= world_size
    return loss.detach(), gradients


@pytest.mark.parametrize("width", [8, 5], ids=["equal", "unequal"])
def test_masked_feature_distillation_compares_the_masked_embedding(width: int) -> None:
    method = ClipKD(8, [width], mask_ratio=0.5).double()
    student, teacher = features(8), features(width, scale=30.0, seed=1)
    masked = features(8, seed=2).image
    plain, terms = method(student, [teacher]), method(student, [teacher], masked)
    hats = method.image_head(masked), method.text_head(student.text)
    expected = sum(
        F.mse_loss(F.normalize(a, dim=-1), F.normalize(b, dim=-1))
        for a, b in zip(hats, teacher[:2], strict=True)
    )
    torch.testing.assert_close(terms["fd"], expected)
    assert all(torch.equal(terms[name], plain[name]) for name in ("task", "crd", "icl"))


def test_fd_summed_over_the_width_has_a_name_and_a_weight_of_its_own() -> None:
    student, teacher = features(8), features(8, seed=1)
    mean = ClipKD(8, [8], fd=2000.0).double()
    total = ClipKD(8, [8], fd=2000.0 / 8, fd_reduction="sum").double()
    one, other = mean(student, [teacher])["fd"], total(student, [teacher])["fd_sum"]
    torch.testing.assert_close(mean.weights["fd"] * one, total.weights["fd_sum"] * other)
    assert "fd" not in total.weights


def test_a_mask_without_use_is_refused() -> None:
    with pytest.raises(ValueError, match="fd is 0"):
        ClipKD(8, [8], mask_ratio=0.5, fd=0.0)


@pytest.mark.parametrize("width", [8, 5], ids=["equal", "unequal"])
def test_two_ranks_average_to_the_whole_batch(
    width: int, run_ranks: Callable[..., list[Any]]
) -> None:
    torch.manual_seed(0)
    whole_loss, whole = _rank_gradients(0, 1, width)
    for loss, gradients in run_ranks(_rank_gradients, 2, width):
        torch.testing.assert_close(loss, whole_loss, rtol=1e-10, atol=1e-12)
        assert len(gradients) == len(whole)
        for got, want in zip(gradients, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
