# SPDX-License-Identifier: Apache-2.0
"""``reference_quirks`` against a transcription of what CLIP-KD's released code computes.

The transcription is dense and works on the gathered batch, as every rank of the released code does.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdengine.losses import gradient, quirks
from kdengine.methods import ClipKD, Distillation
from kdengine.models import Features

NAMES = ("task", "crd", "fd", "icl", "gd", "afd")
RECIPE = {"task": 1.0, "crd": 1.0, "fd": 2000.0, "icl": 1.0}
MIXES: dict[str, dict[str, float]] = {
    **{name: {name: 1.3} for name in NAMES},
    "recipe": RECIPE,
    "fd and icl": {"task": 1.0, "fd": 2000.0, "icl": 1.0},
    "recipe and gd": {**RECIPE, "gd": 1e8},
    "everything": {**RECIPE, "gd": 1e8, "afd": 0.7},
}


def features(width: int, scale: float = 12.0, seed: int = 0, batch: int = 6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    image, text = (torch.randn(batch, width, **draw) for _ in range(2))
    return Features(image, text, torch.tensor([scale], dtype=torch.float64))


def leaves(values: Features) -> Features:
    return Features(*(value.clone().requires_grad_() for value in values))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def inner_gradients(anchor: Tensor, other: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one direction's cross-entropy at both sides, as the released code has them."""
    num_pairs = len(anchor)
    probability = (anchor @ other.T / temperature).softmax(1)
    residual = probability - torch.eye(num_pairs, dtype=anchor.dtype)
    to_anchor = residual @ other / temperature / num_pairs
    # the released code expands this to N x D x N and sums
    to_other = (residual[:, None, :] * anchor[:, :, None]).sum(0).T / temperature / num_pairs
    return to_anchor, to_other


def released(
    student: Features,
    teacher: Features,
    heads: Sequence[Callable[[Tensor], Tensor]],
    raw_scales: Sequence[Tensor | None],
    fusions: Sequence[Callable[[Tensor], Tensor] | None],
) -> dict[str, Tensor]:
    """All terms before their weights; without a scale or fusions, without their terms."""
    v, s = unit(student.image), unit(student.text)
    v_hat, s_hat = (unit(head(x)) for head, x in zip(heads, student[:2], strict=True))
    v_t, s_t = unit(teacher.image).detach(), unit(teacher.text).detach()
    diagonal = torch.arange(len(v))
    own, target = student.scale * v @ s.T, (teacher.scale * v_t @ s_t.T).detach()

    def kl(logits: Tensor, goal: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), F.softmax(goal, 1), reduction="batchmean")

    def contrastive(rows: Tensor, cols: Tensor) -> Tensor:
        return (F.cross_entropy(rows, diagonal) + F.cross_entropy(cols, diagonal)) / 2

    # the scale is passed where a temperature is expected
    ours = [inner_gradients(*x, student.scale) for x in ((v_hat, s_hat), (s_hat, v_hat))]
    theirs = [inner_gradients(*x, teacher.scale) for x in ((v_t, s_t), (s_t, v_t))]
    terms = {
        "task": contrastive(own, own.T),
        "crd": (kl(own, target) + kl(own.T, target.T)) / 2,
        "fd": F.mse_loss(v_hat, v_t) + F.mse_loss(s_hat, s_t),
        "gd": sum(
            F.mse_loss(a, b.detach())
            for x, y in zip(ours, theirs, strict=True)
            for a, b in zip(x, y, strict=True)
        ),
    }
    icl_scale, afd_scale = raw_scales
    if icl_scale is not None:
        terms["icl"] = contrastive(icl_scale * v_hat @ s_t.T, icl_scale * s_hat @ v_t.T)
    if afd_scale is not None:
        halves = ((v_hat, v_t), (s_hat, s_t))
        v_a, s_a = (
            unit(f(torch.cat(x, 1))) for f, x in zip(fusions, halves, strict=True) if f is not None
        )
        logits = afd_scale * v_a @ s_a.T
        terms["afd"] = contrastive(logits, logits.T)
    return terms


def truth(method: ClipKD, student: Features, teacher: Features) -> dict[str, Tensor]:
    scales = [getattr(method, name, None) for name in ("log_scale", "fused_log_scale")]
    fusions = [getattr(method, name, None) for name in ("image_fusion", "text_fusion")]
    heads: list[nn.Module] = [method.image_head, method.text_head]
    if isinstance(heads[0], nn.Identity) and student.image.shape != teacher.image.shape:
        # the released code always has heads, the method only for terms that it computes
        widths = student.image.shape[1], teacher.image.shape[1]
        heads = [nn.Linear(*widths).double() for _ in heads]
    return released(student, teacher, heads, scales, fusions)


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    weighted = [weight * terms[name] for name, weight in weights.items()]
    return sum(weighted[1:], weighted[0])


def build(mix: str, width: int, group: Any = None) -> ClipKD:
    torch.manual_seed(0)
    weights = {**dict.fromkeys(NAMES, 0.0), **MIXES[mix]}
    return ClipKD(8, [width], **weights, reference_quirks=True, group=group).double()


CASES = [(mix, width) for mix in MIXES for width in (8, 5) if width == 8 or "afd" not in MIXES[mix]]


@pytest.mark.parametrize(("mix", "width"), CASES)
def test_terms_and_gradients_are_those_of_the_released_code(mix: str, width: int) -> None:
    method = build(mix, width)
    student, teacher = leaves(features(8)), features(width, 30.0, 1)
    found, expected = method(student, [teacher]), truth(method, student, teacher)
    for name in method.weights:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=0)
    inputs = [*student, *method.parameters()]
    got, want = (
        torch.autograd.grad(total(terms, method.weights), inputs, allow_unused=True)
        for terms in (found, expected)
    )
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


SPREAD = [("everything", 8), ("recipe and gd", 5)]


def rank_all(rank: int, world_size: int) -> list[Any]:
    return [rank_terms(rank, world_size, *case) for case in SPREAD]


def rank_terms(
    rank: int, world_size: int, mix: str, width: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Terms and gradients of one rank's rows, averaged over ranks."""
    method = build(mix, width, torch.distributed.group.WORLD)
    rows = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    whole, all_teachers = leaves(features(8)), features(width, 30.0, 1)
    student, teacher = (
        Features(x.image[rows], x.text[rows], x.scale) for x in (whole, all_teachers)
    )
    terms = method(student, [teacher])
    found = list(torch.autograd.grad(total(terms, method.weights), [*whole, *method.parameters()]))
    told = {name: terms[name].detach() for name in method.weights}
    for value in (*told.values(), *found):
        torch.distributed.all_reduce(value)
        value /= world_size
    return told, found


def test_two_ranks_average_to_the_released_loss_of_the_whole_batch(
    run_ranks: Callable[..., list[Any]],
) -> None:
    found = run_ranks(rank_all, 2)
    for number, (mix, width) in enumerate(SPREAD):
        method, student, teacher = build(mix, width), leaves(features(8)), features(width, 30.0, 1)
        expected = truth(method, student, teacher)
        inputs = [*student, *method.parameters()]
        want = torch.autograd.grad(total(expected, method.weights), inputs)
        for terms, got in (of_rank[number] for of_rank in found):
            for name, value in terms.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=0)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def test_the_default_gather_gives_the_encoders_a_share_of_the_gradient() -> None:
    """What is not reproduced: a rank differentiates its own rows of the whole loss only."""
    method, teacher = build("recipe", 8), features(8, 30.0, 1)
    whole, world_size = leaves(features(8)), 2
    loss = total(truth(method, whole, teacher), method.weights)
    true = torch.autograd.grad(loss, whole)
    averaged = [torch.zeros_like(x) for x in whole]
    for rank in range(world_size):
        own = torch.arange(6)[:, None] // 3 == rank
        seen = Features(*(torch.where(own, x, x.detach()) for x in whole[:2]), whole.scale)
        loss = total(truth(method, seen, teacher), method.weights)
        for total_, part in zip(averaged, torch.autograd.grad(loss, whole), strict=True):
            total_ += part / world_size
    torch.testing.assert_close(averaged[0], true[0] / world_size)
    torch.testing.assert_close(averaged[1], true[1] / world_size)
    torch.testing.assert_close(averaged[2], true[2])
    # AdamW's step with the share and eps is that with the gradient and world_size * eps
    gradient, eps = true[0], 1e-6

    def step(g: Tensor, tiny: float) -> Tensor:
        weight = nn.Parameter(torch.zeros_like(g))
        weight.grad = g.clone()
        torch.optim.AdamW([weight], lr=1e-3, eps=tiny).step()
        return weight.detach()

    torch.testing.assert_close(
        step(gradient / world_size, eps), step(gradient, world_size * eps), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_strips_change_nothing_and_are_all_that_is_kept(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = leaves(features(8)), features(8, 30.0, 1)
    expected = released(student, teacher, (nn.Identity(),) * 2, (None, None), (None, None))["gd"]
    want = torch.autograd.grad(expected, student)
    monkeypatch.setattr(quirks, "CELLS", 6 * rows)
    strip, heights = quirks.strip, []
    monkeypatch.setattr(quirks, "strip", lambda *x: heights.append(len(x[0])) or strip(*x))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = quirks.released_gradient(*student, *teacher, normalize=True)
    assert max(heights) == rows
    # of 6 pairs neither a strip nor a whole matrix of similarities waits for the backward
    assert kept and {6 * rows, 36}.isdisjoint(kept)
    got = torch.autograd.grad(found, student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-20)


def test_released_gradient_distillation_is_inert_as_measured() -> None:
    """Weight 1e8 at random: 0.0037, of a sharp teacher; the paper's form 150, of an equal one."""
    student, teacher = torch.randn(2, 1024, 512), torch.randn(2, 1024, 512)
    mild = 1 / 0.07
    released_one = quirks.released_gradient(*student, mild, *teacher, 100.0, normalize=True)
    papers = gradient(*student, mild, *teacher, mild, normalize=True)
    assert 1e8 * released_one.item() == pytest.approx(0.0037, rel=0.02)
    assert 1e8 * papers.item() == pytest.approx(150, rel=0.05)


def test_autocast_rounds_nothing() -> None:
    student, teacher = (
        [x.float() for x in values] for values in (features(8), features(8, 30.0, 1))
    )
    plain = quirks.released_gradient(*student, *teacher, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quirks.released_gradient(*student, *teacher, normalize=True)
    assert torch.equal(plain, cast)


class Tower(nn.Module):
    """Stands in for a student that cannot be masked, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.passes = 0

    def forward(self, image: Tensor, tokens: Tensor, mask_ratio: float = 0.0) -> Features:
        assert not mask_ratio
        self.passes += 1
        return Features(image, tokens, self.log_scale.exp())


@pytest.mark.parametrize("mask_all", [False, True])
def test_released_masking_is_feature_distillation(
    mask_all: bool, caplog: pytest.LogCaptureFixture
) -> None:
    mask = {"mask_ratio": 0.75, "mask_all": mask_all}
    with caplog.at_level(logging.WARNING):
        masked = ClipKD(8, [8], **mask, reference_quirks=True).double()
    (record,) = caplog.records
    assert "mask_ratio=0.75 is ignored, as the released code ignores it" in record.getMessage()
    plain = ClipKD(8, [8], reference_quirks=True).double()
    tower, pair, teacher = Tower(), features(8), features(8, 30.0, 1)
    found, logged = Distillation(tower, masked)(pair.image, pair.text, [teacher])  # type: ignore
    assert tower.passes == 1
    expected, _ = Distillation(tower, plain)(pair.image, pair.text, [teacher])  # type: ignore
    assert torch.equal(found, expected) and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ([5], {"afd": 1.0}, r"released AFD fails where the widths differ; 8 and 5 came"),
        ([8, 8], {}, r"released code has one teacher; 2 came"),
    ],
    ids=["afd", "teachers"],
)
def test_what_the_released_code_cannot_do_is_refused(
    widths: list[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClipKD(8, widths, **options, reference_quirks=True)
