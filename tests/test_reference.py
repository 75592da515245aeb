# SPDX-License-Identifier: Apache-2.0
"""The oracle by itself: hand-computed cases, float64 gradients, invariances, refusals."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference

LN3 = math.log(3.0)
EYE = torch.eye(2, dtype=torch.float64)
FLAT = torch.zeros(2, 2, dtype=torch.float64)


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-14, abs=1e-15)


# one random case a loss: (differentiable inputs, constants) by parameter name
def _pairs(width: int = 4) -> dict[str, Tensor]:
    scale = torch.tensor([7.0], dtype=torch.float64)
    return {"image": unit_rows(5, width), "text": unit_rows(5, width), "scale": scale}


def _teacher(width: int = 3, scale: bool = True) -> dict[str, Any]:
    teacher = {"teacher_image": unit_rows(5, width), "teacher_text": unit_rows(5, width)}
    return teacher | ({"teacher_scale": 9.0} if scale else {})


def _fusion_inputs() -> tuple[dict, dict]:
    weights = torch.randn(2, 4, 7, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    heads = {
        "image_fusion": lambda x: F.linear(x, weights[0].to(x), bias.to(x)),
        "text_fusion": lambda x: F.linear(x, weights[1].to(x), bias.to(x)),
    }
    return _pairs(), _teacher(3, scale=False) | heads


def _cluster_inputs() -> dict[str, Tensor]:
    return {
        "image": unit_rows(5, 4),
        "centroids": unit_rows(8, 4),
        "scale": torch.tensor(7.0, dtype=torch.float64),
    }


def _cluster_teacher(name: str) -> dict[str, Any]:
    return {"teacher_image": unit_rows(5, 3), name: unit_rows(8, 3), "teacher_scale": 9.0}


CASES: dict[str, Callable[[], tuple[dict, dict]]] = {
    "info_nce": lambda: (_pairs(), {}),
    "contrastive_relational": lambda: (_pairs(), _teacher()),
    "interactive_contrastive": lambda: (_pairs(), _teacher(4, scale=False)),
    "feature": lambda: ({"student": unit_rows(5, 4)}, {"teacher": unit_rows(5, 4)}),
    "gradient": lambda: (_pairs(), _teacher(4)),
    "augmented_feature": _fusion_inputs,
    "cluster_cross_entropy": lambda: (
        _cluster_inputs(),
        {"labels": torch.tensor([3, 7, 0, 3, 5]), "margin": 0.3},
    ),
    "cluster_kl": lambda: (
        _cluster_inputs(),
        _cluster_teacher("teacher_centroids") | {"temperature": 2.0},
    ),
    "logit_kl": lambda: (
        {{"centroids": "text"}.get(k, k): v for k, v in _cluster_inputs().items()},
        _cluster_teacher("teacher_text") | {"temperature": 2.0},
    ),
    "moment_alignment": lambda: ({"student": unit_rows(5, 4)}, {"teacher": unit_rows(5, 4)}),
}


@pytest.mark.parametrize("name", reference.LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    inputs, constants = CASES[name]()
    for value in inputs.values():
        value.requires_grad_()

    def loss(*values: Tensor) -> Tensor:
        return reference.LOSSES[name](**dict(zip(inputs, values, strict=True)), **constants)

    assert torch.autograd.gradcheck(loss, tuple(inputs.values()))


@pytest.mark.parametrize("name", reference.LOSSES)
def test_teachers_and_labels_get_no_gradient(name: str) -> None:
    inputs, constants = CASES[name]()
    teachers = [x for k, x in constants.items() if "teacher" in k and isinstance(x, Tensor)]
    for value in [*inputs.values(), *teachers]:
        value.requires_grad_()
    reference.LOSSES[name](**inputs, **constants).backward()
    assert all(value.grad is not None and value.grad.any() for value in inputs.values())
    assert all(value.grad is None for value in teachers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", reference.LOSSES)
def test_any_float_dtype_is_kept_and_close_to_float64(name: str, dtype: torch.dtype) -> None:
    inputs, constants = CASES[name]()
    both = inputs | constants
    rounded = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in both.items()
    }
    loss = reference.LOSSES[name](**rounded)
    assert loss.dtype == dtype
    assert loss.shape == ()
    truth = reference.LOSSES[name](**both).item()
    assert loss.item() == pytest.approx(truth, rel=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", reference.LOSSES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    inputs, constants = CASES[name]()
    order = torch.randperm(5)
    permuted = {
        k: v[order] if isinstance(v, Tensor) and v.ndim and len(v) == 5 else v
        for k, v in (inputs | constants).items()
    }
    value = reference.LOSSES[name](**inputs, **constants).item()
    assert reference.LOSSES[name](**permuted).item() == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("name", reference.LOSSES)
def test_losses_are_short_and_documented(name: str) -> None:
    source = inspect.getsource(reference.LOSSES[name])
    doc = reference.LOSSES[name].__doc__ or ""
    body = source.split('"""')[2].strip().splitlines()
    assert len(body) <= 15
    assert all(word in doc for word in ("Shapes:", "Returns:", "Source:"))


# hand-computed: the identity with scale ln 3 has row and column softmax (3/4, 1/4)
def test_info_nce_by_hand() -> None:
    assert reference.info_nce(EYE, EYE, LN3).item() == exactly(math.log(4 / 3))


def test_info_nce_takes_both_directions_by_hand() -> None:
    # logits (ln 3, 0; ln 3, 0): rows 3/4 and 1/4, columns 1/2 and 1/2
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    by_rows = (math.log(4 / 3) + math.log(4)) / 2
    assert reference.info_nce(image, EYE, LN3).item() == exactly((by_rows + math.log(2)) / 2)


def test_contrastive_relational_by_hand() -> None:
    # teacher (1/2, 1/2): KL = 1/2 ln(2/3) + 1/2 ln 2, and 1/2 of rows plus columns is one of them
    loss = reference.contrastive_relational(EYE, EYE, LN3, FLAT, FLAT, 1.0)
    assert loss.item() == exactly(math.log(4 / 3) / 2)


def test_contrastive_relational_goes_from_teacher_to_student_by_hand() -> None:
    # the reverse direction: KL((3/4, 1/4) || (1/2, 1/2))
    loss = reference.contrastive_relational(FLAT, FLAT, 1.0, EYE, EYE, LN3)
    assert loss.item() == exactly(3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2))


def test_interactive_contrastive_by_hand() -> None:
    # image anchors name the right teacher text with 3/4, text anchors the teacher image with 1/4
    loss = reference.interactive_contrastive(EYE, EYE, LN3, EYE.flip(0), EYE)
    assert loss.item() == exactly((math.log(4 / 3) + math.log(4)) / 2)


@pytest.mark.parametrize(("reduction", "value"), [("mean", 7.5), ("sum", 15.0)])
def test_feature_by_hand(reduction: str, value: float) -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert reference.feature(student, FLAT, reduction=reduction).item() == exactly(value)


def test_feature_normalizes_both_sides_by_hand() -> None:
    loss = reference.feature(3 * EYE, 5 * EYE.flip(0), normalize=True, reduction="sum")
    assert loss.item() == exactly(2.0)


def test_gradient_by_hand() -> None:
    # g = ln 3 / 2 * (-1/4, 1/4; 1/4, -1/4) for both modalities, and 0 for the flat teacher
    loss = reference.gradient(EYE, EYE, LN3, FLAT, FLAT, 1.0)
    assert loss.item() == exactly(LN3**2 / 32)


def test_augmented_feature_by_hand() -> None:
    # the fusion keeps the student half for images, the teacher half for text, at other lengths
    loss = reference.augmented_feature(
        EYE, FLAT, LN3, FLAT, EYE, lambda x: 3 * x[:, :2], lambda x: 5 * x[:, 2:]
    )
    assert loss.item() == exactly(math.log(4 / 3))


def test_cluster_cross_entropy_by_hand() -> None:
    # both cosines are 1/2; the margin of 30 degrees turns the target's into cos 90 = 0
    image = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    centroids = torch.tensor([[0.5, 0.75**0.5], [0.5, -(0.75**0.5)]], dtype=torch.float64)
    label = torch.tensor([1])
    plain = reference.cluster_cross_entropy(image, centroids, 2 * LN3, label)
    with_margin = reference.cluster_cross_entropy(image, centroids, 2 * LN3, label, math.pi / 6)
    assert plain.item() == exactly(math.log(2))
    assert with_margin.item() == exactly(math.log(4))


@pytest.mark.parametrize("name", ["cluster_kl", "logit_kl"])
def test_one_sided_kl_by_hand(name: str) -> None:
    # one row, temperature 2: student softmax (3/4, 1/4), teacher (1/2, 1/2), times 2^2
    teacher = (FLAT[:1], FLAT, 1.0)
    loss = reference.LOSSES[name](EYE[:1], EYE, 2 * LN3, *teacher, temperature=2.0)
    assert loss.item() == exactly(2 * math.log(4 / 3))


def test_moment_alignment_by_hand() -> None:
    # means (1, 2) against (1, 1), biased variances (1, 4) against (0, 0)
    student = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    assert reference.moment_alignment(student, FLAT + 1).item() == exactly(0.5 + 2.5)


def test_info_nce_gradients_by_hand() -> None:
    image, text = reference.info_nce_gradients(EYE, EYE.flip(1), LN3)
    # cosines (0, 1; 1, 0): p_ii = 1/4, so G = (-3/4, 3/4; 3/4, -3/4)
    expected = LN3 / 2 * torch.tensor([[0.75, -0.75], [-0.75, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(image, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(text, -expected, rtol=1e-14, atol=0)


def test_confident_closed_form_gradients_keep_their_relative_accuracy() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    gradient, _ = reference.info_nce_gradients(eye, eye, 100.0)
    expected = 100 * math.exp(-100) / 3
    assert gradient[0, 0].item() == pytest.approx(-2 * expected, rel=1e-12, abs=0)


def test_one_hot_student_and_flat_teacher_cost_the_whole_gap() -> None:
    # KL = -ln 3 + (0 + 300 + 300) / 3
    eye, flat = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    loss = reference.contrastive_relational(eye, eye, 300.0, flat, flat, 1.0)
    assert loss.item() == pytest.approx(200 - math.log(3), rel=1e-13)


def test_single_pair_has_zero_loss_and_gradient() -> None:
    image = unit_rows(1, 4).requires_grad_()
    loss = reference.info_nce(image, unit_rows(1, 4), 50.0)
    loss.backward()
    assert loss.item() == 0
    assert not image.grad.any()


def test_margin_is_finite_on_top_of_and_opposite_to_the_centroid() -> None:
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    loss = reference.cluster_cross_entropy(image, centroids, 5.0, torch.tensor([0, 0]), 0.3)
    loss.backward()
    by_hand = [math.log1p(math.exp(-5 * c)) for c in (math.cos(0.3), math.cos(math.pi + 0.3))]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-13)
    assert image.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: reference.info_nce(unit_rows(3, 4), unit_rows(3, 5), 1.0),
            r"similarity_terms: .*same width; \(3, 4\) and \(3, 5\) came.*projection head",
            id="widths differ",
        ),
        pytest.param(
            lambda: reference.info_nce(unit_rows(3, 4), unit_rows(5, 4), 1.0),
            "without col_labels, number i of 5 has positive i; there are only 3",
            id="more columns than rows",
        ),
        pytest.param(
            lambda: reference.info_nce(unit_rows(5, 4), unit_rows(3, 4), 1.0),
            "without labels, number i of 5 has positive i; there are only 3",
            id="more rows than columns",
        ),
        pytest.param(
            lambda: reference.similarity_terms(
                unit_rows(3, 4), unit_rows(3, 4), 1.0, labels=torch.tensor([0])
            ),
            r"labels needs one number for each of 3; shape \(1,\) came",
            id="too few labels",
        ),
        pytest.param(
            lambda: reference.similarity_loss(unit_rows(3, 4), unit_rows(3, 4), 1.0, soft_rows=0.5),
            "soft_rows=0.5 and soft_cols=0.0 need a teacher; none came",
            id="soft weight without teacher",
        ),
        pytest.param(
            lambda: reference.similarity_terms(
                unit_rows(3, 4),
                unit_rows(3, 4),
                1.0,
                teacher_query=unit_rows(3, 4),
                teacher_key=unit_rows(3, 4),
            ),
            r"come together.*\[1, 1, 0\] came",
            id="teacher without scale",
        ),
        pytest.param(
            lambda: reference.similarity_terms(
                unit_rows(3, 4),
                unit_rows(3, 4),
                1.0,
                teacher_query=(unit_rows(3, 4), unit_rows(3, 4)),
                teacher_key=(unit_rows(3, 4), unit_rows(3, 4)),
                teacher_scale=2.0,
            ),
            r"come together.*\[2, 2, 1\] came",
            id="two teachers with one scale",
        ),
        pytest.param(
            lambda: reference.contrastive_relational(
                unit_rows(3, 4), unit_rows(3, 4), 1.0, unit_rows(1, 4), unit_rows(3, 4), 1.0
            ),
            "logits and teacher_logits need one shape",
            id="teacher of another batch",
        ),
        pytest.param(
            lambda: reference.feature(unit_rows(3, 4), unit_rows(3, 1)),
            r"feature: student and teacher need one shape; .*\(3, 4\).*\(3, 1\)",
            id="feature widths differ",
        ),
        pytest.param(
            lambda: reference.feature(unit_rows(3, 4), unit_rows(3, 4), reduction="none"),
            'feature: reduction is "mean" or "sum"; \'none\' came',
            id="unknown reduction",
        ),
        pytest.param(
            lambda: reference.gradient(*[unit_rows(3, 4)] * 2, 1.0, *[unit_rows(3, 1)] * 2, 1.0),
            "gradient: image and teacher_image need one shape",
            id="gradient widths differ",
        ),
        pytest.param(
            lambda: reference.moment_alignment(unit_rows(3, 4), unit_rows(3, 1)),
            "moment_alignment: student and teacher need one shape",
            id="moment widths differ",
        ),
    ],
)
def test_refuses_with_advice(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
