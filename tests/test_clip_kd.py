# SPDX-License-Identifier: Apache-2.0
"""CLIP-KD with one and with several teachers against the float64 oracle and closed forms.

Of several teachers relations are averaged and features united.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counting
from kdengine import config, losses, reference
from kdengine.distributed import Exchange
from kdengine.methods import ClipKD, build_method
from kdengine.models import Features

SPREAD = ["concat, unequal", "mean, another"]
WEIGHTS = {"task": 1.0, "crd": 0.7, "fd": 50.0, "icl": 1.3, "gd": 1e3, "afd": 0.5}
CASES = {
    "one, equal": ("concat", (8,)),
    "one, unequal": ("concat", (5,)),
    "concat, equal": ("concat", (8, 8)),
    "concat, unequal": ("concat", (8, 5)),
    "concat, three": ("concat", (3, 8, 5)),
    "mean, student's": ("mean", (8, 8)),
    "mean, another": ("mean", (5, 5)),
}


MIXES = {
    **{name: {name: weight} for name, weight in WEIGHTS.items()},
    "recipe": {name: WEIGHTS[name] for name in ("task", "crd", "fd", "icl")},
    "no task": {name: WEIGHTS[name] for name in ("crd", "fd", "icl")},
    "fd and icl": {name: WEIGHTS[name] for name in ("task", "fd", "icl")},
    "relations": {name: WEIGHTS[name] for name in ("task", "crd", "afd")},
    "gradients": {name: WEIGHTS[name] for name in ("task", "gd", "icl")},
}


def features(width: int, scale: float = 12.0, seed: int = 0, batch: int = 6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    image, text = (torch.randn(batch, width, **draw) for _ in range(2))
    return Features(image, text, torch.tensor([scale], dtype=torch.float64))


def leaves(values: Features) -> Features:
    return Features(*(value.clone().requires_grad_() for value in values))


def teachers_of(widths: Sequence[int]) -> list[Features]:
    return [features(width, 20.0 + 15 * k, k + 1) for k, width in enumerate(widths)]


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def united(rows: Sequence[Tensor], how: str) -> Tensor:
    """The formula of ``ensemble``, written out."""
    if how == "mean":
        return unit(sum(map(unit, rows[1:]), unit(rows[0])))
    return torch.cat([unit(x) for x in rows], 1) / len(rows) ** 0.5


def oracle(
    method: ClipKD, student: Features, teachers: Sequence[Features], how: str
) -> dict[str, Tensor]:
    """The terms that the method computes, from the oracle's dense losses."""
    x, y, scale = unit(student.image), unit(student.text), student.scale
    hats = unit(method.image_head(student.image)), unit(method.text_head(student.text))
    both = [united([t[i] for t in teachers], how) for i in range(2)]
    common = sum(t.scale for t in teachers) / len(teachers)
    relations = [
        reference.contrastive_relational(x, y, scale, unit(t.image), unit(t.text), t.scale)
        for t in teachers
    ]
    terms = {
        "task": lambda: reference.info_nce(x, y, scale),
        "crd": lambda: sum(relations[1:], relations[0]) / len(teachers),
        "fd": lambda: sum(map(reference.feature, hats, both)),
        "icl": lambda: reference.interactive_contrastive(*hats, method.log_scale.exp(), *both),
        "gd": lambda: reference.gradient(*hats, scale, *both, common),
        "afd": lambda: reference.augmented_feature(
            x, y, method.fused_log_scale.exp(), *both, method.image_fusion, method.text_fusion
        ),
    }
    return {name: terms[name]() for name in method.weights}


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    weighted = [weight * terms[name] for name, weight in weights.items()]
    return sum(weighted[1:], weighted[0])


def compare(weights: dict[str, float], how: str, widths: Sequence[int]) -> None:
    torch.manual_seed(0)
    method = ClipKD(8, widths, **weights, teacher_features=how).double()
    student, teachers = leaves(features(8)), teachers_of(widths)
    found, truth = method(student, teachers), oracle(method, student, teachers, how)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)
    inputs = [*student, *method.parameters()]
    got, want = (
        torch.autograd.grad(total(x, method.weights), inputs, allow_unused=True)
        for x in (found, truth)
    )
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_all_terms_equal_the_oracle_with_all_gradients(case: str) -> None:
    compare(WEIGHTS, *CASES[case])


@pytest.mark.parametrize(
    "case", ["one, equal", "one, unequal", "concat, equal", "concat, unequal", "mean, another"]
)
@pytest.mark.parametrize("mix", MIXES)
def test_each_term_alone_and_mixes_equal_the_oracle_with_all_gradients(mix: str, case: str) -> None:
    compare({**dict.fromkeys(WEIGHTS, 0.0), **MIXES[mix]}, *CASES[case])


def through_normalisation(gradient: Tensor, x: Tensor) -> Tensor:
    """From the gradient at a unit row to that at the row."""
    length = x.norm(dim=1, keepdim=True)
    along = (gradient * x).sum(1, keepdim=True) * x / length**2
    return (gradient - along) / length


def test_gradients_of_the_recipe_have_their_closed_form() -> None:
    """With M, E1, E2 the gradients of the logits: of own pairs, image to text and text to image."""
    crd, fd, icl = 0.7, 2000.0, 1.3
    method = ClipKD(8, [8], task=1.0, crd=crd, fd=fd, icl=icl).double()
    student, teacher = leaves(features(8)), features(8, 30.0, 1)
    found = torch.autograd.grad(
        total(method(student, [teacher]), method.weights), [*student, method.log_scale]
    )
    (x, y, scale), multiplier = (z.detach() for z in student), method.log_scale.detach().exp()
    v, s, v_t, s_t = map(unit, (x, y, *teacher[:2]))
    n, eye = len(x), torch.eye(len(x), dtype=torch.float64)

    def both(logits: Tensor) -> Tensor:
        return logits.softmax(1) + logits.softmax(0)

    own, target = both(scale * v @ s.T), both(teacher.scale * v_t @ s_t.T)
    m = ((1 + crd) * own - 2 * eye - crd * target) / (2 * n)
    e1, e2 = (
        icl / (2 * n) * ((multiplier * a @ b.T).softmax(1) - eye) for a, b in ((v, s_t), (s, v_t))
    )
    rate = 2 * fd / (n * 8)
    image = scale * m @ s + multiplier * e1 @ s_t + rate * (v - v_t)
    text = scale * m.T @ v + multiplier * e2 @ v_t + rate * (s - s_t)
    expected = (
        through_normalisation(image, x),
        through_normalisation(text, y),
        (m * (v @ s.T)).sum()[None],
        multiplier * ((e1 * (v @ s_t.T)).sum() + (e2 * (s @ v_t.T)).sum()),
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


def test_gradients_of_gradient_distillation_have_their_closed_form() -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), "gd": 1.0}
    method = ClipKD(8, [8], **weights).double()
    student, teacher = leaves(features(8)), features(8, 30.0, 1)
    found = torch.autograd.grad(method(student, [teacher])["gd"], student)
    (x, y, scale), v_t, s_t = (z.detach() for z in student), *map(unit, teacher[:2])
    v, s = unit(x), unit(y)
    n, eye = len(x), torch.eye(len(x), dtype=torch.float64)

    def inner(a: Tensor, b: Tensor, multiplier: Tensor) -> tuple[Tensor, ...]:
        p, q = (multiplier * a @ b.T).softmax(1), (multiplier * b @ a.T).softmax(1)
        g = ((p - eye) + (q - eye).T) / 2
        return p, q, g, multiplier / n * g @ b, multiplier / n * g.T @ a

    p, q, g, *ours = inner(v, s, scale)
    theirs = inner(v_t, s_t, teacher.scale)[3:]
    u, r = (2 * (a - b) / a.numel() for a, b in zip(ours, theirs, strict=True))
    h = scale / n * (u @ s.T + v @ r.T)
    logits = p * (h - (p * h).sum(1, keepdim=True)) / 2
    logits = logits + (q * (h.T - (q * h.T).sum(1, keepdim=True)) / 2).T
    expected = (
        through_normalisation(scale / n * g @ r + scale * logits @ s, x),
        through_normalisation(scale / n * g.T @ u + scale * logits.T @ v, y),
        ((logits * (v @ s.T)).sum() + ((u * (g @ s)).sum() + (r * (g.T @ v)).sum()) / n)[None],
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("how", ["concat", "mean"])
@pytest.mark.parametrize("width", [8, 5])
def test_one_teacher_is_bit_for_bit_itself(width: int, how: str) -> None:
    """Against the losses called with the one teacher's raw features, as they always were."""
    torch.manual_seed(0)
    method = ClipKD(8, [width], **WEIGHTS, teacher_features=how)
    student, teacher = (
        Features(*(x.float() for x in values)) for values in (features(8), features(width, 30.0, 1))
    )
    found = method(student, [teacher])
    hats = method.image_head(student.image), method.text_head(student.text)
    crd = losses.similarity_terms(
        student.image,
        student.text,
        student.scale,
        teacher_query=teacher.image,
        teacher_key=teacher.text,
        teacher_scale=teacher.scale,
        normalize=True,
    )
    fd = [losses.feature(*pair, normalize=True) for pair in zip(hats, teacher[:2], strict=True)]
    icl = losses.interactive_contrastive(
        *hats, method.interactive_scale(), *teacher[:2], normalize=True
    )
    gd = losses.gradient(*hats, student.scale, *teacher, normalize=True)
    assert torch.equal(found["crd"], 0.5 * (crd.soft_rows + crd.soft_cols))
    torch.testing.assert_close(found["fd"], fd[0] + fd[1])
    assert torch.equal(found["icl"], icl) and torch.equal(found["gd"], gd)
    normal = [F.normalize(x, dim=-1) for x in (*student[:2], *teacher[:2])]
    fused = (method.fused_log_scale.exp(), *normal[2:], method.image_fusion, method.text_fusion)
    assert torch.equal(found["afd"], losses.augmented_feature(*normal[:2], *fused))


def normalisations(loss: Tensor) -> int:
    """Backwards through L2 normalisations that the gradient of a loss runs, FD's as one."""
    nodes, seen, count = [loss.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += any(word in type(node).__name__ for word in ("VectorNorm", "feature_forward"))
        nodes += [following for following, _ in node.next_functions]
    return count


@pytest.mark.parametrize(
    ("width", "weights", "expected"),
    [
        # image and text, which FD takes in one launch
        (5, {}, 1),
        (5, {"gd": 1.0}, 1),
        (5, {"fd": 0.0, "gd": 1.0}, 2),
        # and of those behind the heads
        (7, {"gd": 1.0}, 3),
        # and of the fused ones
        (5, {"gd": 1.0, "afd": 1.0}, 3),
        (7, {"gd": 1.0, "afd": 1.0}, 5),
    ],
)
def test_gradients_go_through_each_normalisation_once(
    width: int, weights: dict[str, float], expected: int
) -> None:
    method = ClipKD(5, [width], **weights).double()
    terms = method(leaves(features(5)), teachers_of([width]))
    assert normalisations(total(terms, method.weights)) == expected


def test_a_masked_image_has_a_normalisation_of_its_own() -> None:
    method, masked = ClipKD(5, [5], mask_ratio=0.5).double(), features(5, seed=9).image
    terms = method(leaves(features(5)), teachers_of([5]), masked.clone().requires_grad_())
    assert normalisations(total(terms, method.weights)) == 2


def test_the_mean_of_a_teacher_twice_is_the_teacher_once() -> None:
    torch.manual_seed(0)
    once = ClipKD(8, [8], **WEIGHTS).double()
    twice = ClipKD(8, [8, 8], **WEIGHTS, teacher_features="mean").double()
    twice.load_state_dict(once.state_dict())
    student, teacher = features(8), features(8, 30.0, 1)
    found, truth = twice(student, [teacher, teacher]), once(student, [teacher])
    for name in WEIGHTS:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-12, atol=1e-15)


def test_the_method_refuses_before_anything_runs() -> None:
    settings = config.Method(clip_kd=config.ClipKD(teacher_features="mean"))
    with pytest.raises(ValueError, match=r"\[8, 5\] came.*teacher-features concat"):
        build_method(settings, student_width=8, teacher_widths=[8, 5])
    # relations need no common width
    relations = {"task": 1.0, "crd": 1.0, "fd": 0.0, "icl": 0.0}
    ClipKD(8, [8, 5], **relations, teacher_features="mean")
    with pytest.raises(ValueError, match="expected 2 teachers, of widths .8, 5.; 1 came"):
        ClipKD(8, [8, 5])(features(8), [features(8)])


def rank_gradients(
    rank: int, world_size: int, how: str, widths: Sequence[int]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Terms and gradients, averaged over ranks, of the rows of all ranks."""
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    method = ClipKD(8, widths, **WEIGHTS, teacher_features=how, group=group).double()
    rows = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    whole = leaves(features(8))
    student, *teachers = (
        Features(x.image[rows], x.text[rows], x.scale) for x in (whole, *teachers_of(widths))
    )
    terms = method(student, teachers)
    inputs = [*whole, *method.parameters()]
    found = list(torch.autograd.grad(total(terms, method.weights), inputs))
    told = {name: terms[name].detach() for name in method.weights}
    for value in (*told.values(), *found):
        if world_size > 1:
            torch.distributed.all_reduce(value)
            value /= world_size
    return told, found


def gathered_bytes(weights: dict[str, float], **how: Any) -> float:
    """What one of two ranks sends by all-gathers in a step of 3 pairs, widths 8 and 5."""
    group = Exchange(torch.distributed.group.WORLD, **how)
    method = ClipKD(8, [5], **weights, group=group).double()
    student = leaves(features(8, batch=3))
    with counting.counting() as counts:
        total(method(student, [features(5, 30.0, 1, batch=3)]), method.weights).backward()
    return counts.bytes["all_gather_into_tensor"]


def rank_all(rank: int, world_size: int) -> list[Any]:
    return [rank_gradients(rank, world_size, *CASES[case]) for case in SPREAD]


def rank_all_and_bytes(rank: int, world_size: int) -> tuple[list[Any], list[float]]:
    icl = {"fd": 0.0, "icl": 1.0}
    counted = [
        gathered_bytes({"crd": 0.0, **icl}),
        gathered_bytes({"crd": 1.0, **icl}),
        gathered_bytes({"crd": 1.0, **icl, "gd": 1.0}),
        gathered_bytes({"crd": 1.0, **icl}, regather=True),
    ]
    return rank_all(rank, world_size), counted


_FOUND: list[Any] = []


@pytest.fixture
def two_ranks(run_ranks: Callable[..., list[Any]]) -> list[Any]:
    """What two ranks found; the processes are started once."""
    if not _FOUND:
        _FOUND.extend(run_ranks(rank_all_and_bytes, 2))
    return _FOUND


def test_a_constant_of_several_losses_travels_once(two_ranks: list[Any]) -> None:
    pair, number = 3 * 8, 8
    # ICL alone: student's text, teacher's text and image, and each time eight sizes
    alone = pair * (8 + 5 + 5) + 3 * 8 * number
    # GD's texts, upstream gradients; log-sum-exps of both, means of the student; sizes
    more = pair * (5 + 5) + pair * (2 + 2 + 1) + 5 * number
    # kept nowhere: CRD's keys twice, and the teacher's text for ICL
    again = pair * (8 + 5) + pair * 5
    for _, counted in two_ranks:
        assert counted == [alone, alone, alone + more, alone + again]


def test_two_ranks_average_to_the_whole_batch(two_ranks: list[Any]) -> None:
    found = [gradients for gradients, _ in two_ranks]
    for number, (whole_terms, whole) in enumerate(rank_all(0, 1)):
        for terms, gradients in (of_rank[number] for of_rank in found):
            for name, value in whole_terms.items():
                torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=1e-13)
            for got, want in zip(gradients, whole, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
