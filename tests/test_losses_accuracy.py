# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the relational losses against the float64 oracle, on easy and hostile features."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference

DOUBLE = torch.float64
# dtype: loss, gradients of features, gradient of scale (relative)
TOLERANCE = {
    torch.float64: (1e-12, 1e-10, 1e-10),
    torch.float32: (1e-6, 1e-5, 1e-5),
    torch.bfloat16: (1e-5, 4e-3, 5e-3),
}


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=DOUBLE), dim=1)


def pairs(rows: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    """Images and texts that agree the better the smaller the noise."""
    image = unit(rows, width)
    return image, F.normalize(image + noise * unit(rows, width), dim=1)


def evaluate(module, dtype: torch.dtype, query: Tensor, key: Tensor, scale: float, **options):
    """Loss, then gradients of query, key and scale, for an upstream gradient of 1.7."""
    query, key = (x.to(dtype).detach().requires_grad_() for x in (query, key))
    number = torch.tensor(scale, dtype=DOUBLE if dtype == DOUBLE else torch.float32)
    number.requires_grad_()
    for name in ("teacher_query", "teacher_key"):
        if name in options:
            options[name] = options[name].to(dtype)
    loss = module.similarity_loss(query, key, number, **options)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, (query, key, number))]


def assert_accurate(dtype: torch.dtype, query: Tensor, key: Tensor, scale: float, **options):
    """Within TOLERANCE, plus twice the error of the dense eager loss in float32 (its floor)."""
    query, key = query.to(dtype).to(DOUBLE), key.to(dtype).to(DOUBLE)
    for name in ("teacher_query", "teacher_key"):
        if name in options:
            options[name] = options[name].to(dtype).to(DOUBLE)
    ours = evaluate(losses, dtype, query, key, scale, **options)
    eager = evaluate(reference, torch.float32, query, key, scale, **options)
    truth = evaluate(reference, DOUBLE, query, key, scale, **options)
    loss_limit, feature_limit, scale_limit = TOLERANCE[dtype]
    limits = (loss_limit, feature_limit, feature_limit, scale_limit)
    # logits are known to eps of their size; gradients of features multiply by scale once more
    eps = torch.finfo(DOUBLE if dtype == DOUBLE else torch.float32).eps
    largest = max(1.0, scale, options.get("teacher_scale", 0.0))
    feature_floor = eps * max(1.0, scale) ** 2 if dtype == DOUBLE else 0.0
    floors = {"loss": eps * largest, "query": feature_floor, "key": feature_floor, "scale": eps}
    for name, x, y, true_x, limit in zip(floors, ours, eager, truth, limits, strict=True):
        assert x.isfinite().all(), name
        error, size = (x.double() - true_x).norm().item(), true_x.norm().item()
        eager_error = (y.double() - true_x).norm().item() if dtype != DOUBLE else 0
        allowed = limit * size + 2 * eager_error + floors[name]
        assert error <= allowed, f"{name}: error {error:.1e} of {size:.1e}, allowed {allowed:.1e}"


def assert_relative(dtype: torch.dtype, limit: float, query: Tensor, key: Tensor, *args, **options):
    """Loss and gradients within ``limit`` (features in the dtype's own), whatever their size."""
    query, key = query.to(dtype).to(DOUBLE), key.to(dtype).to(DOUBLE)
    ours = evaluate(losses, dtype, query, key, *args, **options)
    truth = evaluate(reference, DOUBLE, query, key, *args, **options)
    features = max(limit, TOLERANCE[dtype][1])
    limits = (limit, features, features, limit)
    for x, true_x, allowed in zip(ours, truth, limits, strict=True):
        error = (x.double() - true_x).norm() / true_x.norm()
        assert error <= allowed


@pytest.mark.parametrize("scale", [1e-3, 1.0, 14.3, 100.0])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 2, 5), (63, 65, 37), (127, 63, 16)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hard_and_soft_terms_are_accurate(dtype: torch.dtype, shape: tuple, scale: float) -> None:
    rows, cols, width = shape
    assert_accurate(
        dtype,
        unit(rows, width),
        unit(cols, width),
        scale,
        labels=torch.randint(0, cols, (rows,)),
        col_labels=torch.randint(0, rows, (cols,)),
        teacher_query=unit(rows, 11),
        teacher_key=unit(cols, 11),
        teacher_scale=50.0,
        hard_rows=0.3,
        hard_cols=0.7,
        soft_rows=1.1,
        soft_cols=0.4,
    )


@pytest.mark.parametrize("noise", [0.3, 0.1, 0.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_confident_pairs_keep_their_relative_accuracy(dtype: torch.dtype, noise: float) -> None:
    # what logits of size 60 resolve; 1 - p is down to 1e-17, so a difference from 1 sees nothing
    limit = 3 * 60 * torch.finfo(DOUBLE if dtype == DOUBLE else torch.float32).eps
    assert_relative(dtype, limit, *pairs(96, 64, noise), 60.0)


def test_pairs_beyond_float32_resolution_give_tiny_losses_not_zero() -> None:
    image, text = pairs(96, 256, 0.0)
    loss, gradient, *_ = evaluate(losses, torch.float32, image, text, 60.0)
    assert 0 < loss < 1e-15
    assert gradient.norm() > 0


CASES = {
    "duplicates": lambda x: (x.repeat(2, 1), x.repeat(2, 1)),
    "negated towers": lambda x: (x.repeat(2, 1), -x.repeat(2, 1)),
    "one direction": lambda x: (x[:1].repeat(32, 1), -x[:1].repeat(32, 1)),
    "identical towers": lambda x: (x, x),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hostile_features_stay_accurate(dtype: torch.dtype, case) -> None:
    query, key = case(unit(16, 64))
    teacher = pairs(len(query), 33, 0.8)
    # one direction: the gradient is an exact cancellation, only its size against one row counts
    if case is CASES["one direction"]:
        values = evaluate(losses, dtype, query, key, 100.0)
        assert abs(values[0].item() - torch.tensor(32.0).log().item()) < 1e-5
        assert all(x.isfinite().all() for x in values)
        return
    weights = {"soft_rows": 0.5, "soft_cols": 0.5, "teacher_scale": 30.0}
    options = {"teacher_query": teacher[0], "teacher_key": teacher[1], **weights}
    assert_accurate(dtype, query, key, 100.0, **options)


def soft_only(teacher: tuple[Tensor, Tensor], scale: float) -> dict:
    options = {"teacher_query": teacher[0], "teacher_key": teacher[1], "teacher_scale": scale}
    return options | {"hard_rows": 0.0, "hard_cols": 0.0, "soft_rows": 0.5, "soft_cols": 0.5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_hot_teacher_and_uniform_student(dtype: torch.dtype) -> None:
    assert_accurate(dtype, unit(48, 64), unit(48, 64), 1e-3, **soft_only(pairs(48, 64, 0.0), 100.0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_uniform_teacher_and_one_hot_student(dtype: torch.dtype) -> None:
    teacher = (unit(48, 64), unit(48, 64))
    assert_accurate(dtype, *pairs(48, 64, 0.0), 100.0, **soft_only(teacher, 1e-3))


@pytest.mark.parametrize("noise", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_student_equal_to_teacher_costs_nothing(dtype: torch.dtype, noise: float) -> None:
    image, text = (x.to(dtype) for x in pairs(65, 64, noise))
    loss, *gradients = evaluate(losses, dtype, image, text, 40.0, **soft_only((image, text), 40.0))
    eps = torch.finfo(DOUBLE if dtype == DOUBLE else torch.float32).eps
    assert abs(loss.item()) < 10 * eps
    assert all(x.double().norm() < 40 * eps for x in gradients)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_student_near_its_teacher_has_a_small_divergence_not_noise(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype).to(DOUBLE) for x in pairs(64, 64, 0.3))
    near = F.normalize(image + 0.02 * unit(64, 64), dim=1)
    # the divergence is about 1e-11, of which the difference of two log-sum-exps in float32 would
    # see only its noise of 1e-6; even the float64 oracle knows it to 1e-6 of itself only
    limit = 1e-5 if dtype == DOUBLE else 2e-2
    assert_relative(dtype, limit, near, text, 30.0, **soft_only((image, text), 30.0))
