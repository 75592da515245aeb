# SPDX-License-Identifier: Apache-2.0
"""Who decays, and the learning rate of every step."""

import math

import pytest
import torch
from torch import nn

from kdengine.config import Optim
from kdengine.optimizer import Buffers, build_optimizer, decays, learning_rate, parameter_groups


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("visual.conv1.weight", (8, 3, 4, 4), True),
        ("text_projection", (8, 8), True),
        ("positional_embedding", (16, 8), True),
        ("ln_final.weight", (8,), False),
        ("transformer.mlp.bias", (8,), False),
        ("logit_scale", (1,), False),
        ("visual.trunk.attn.relative_position_bias_table", (49, 4), False),
    ],
)
def test_decay_spares_norms_biases_and_scales(name, shape, expected) -> None:
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    with_decay, without = parameter_groups(model.named_parameters(), 0.3)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.3, 0.0)
    assert [len(with_decay["params"]), len(without["params"])] == [1, 4]


def test_adamw_takes_our_settings_and_steps_as_its_formula() -> None:
    optim = Optim(lr=0.1, wd=0.3, beta1=0.8, beta2=0.9, eps=1e-5)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, optim)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-5)
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    # after one step the corrected moments are the gradient and its square
    expected = before * (1 - 0.1 * 0.3) - 0.1 / (1 + 1e-5)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_sgd_has_momentum_and_decays_matrices_alone() -> None:
    optim = Optim(name="sgd", lr=0.1, wd=0.3, momentum=0.8)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, optim)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for velocity in (1.0, 1.8):
        model.weight.grad, model.bias.grad = -0.3 * model.weight.detach(), torch.ones(2)
        optimizer.step()
        bias -= 0.1 * velocity
    torch.testing.assert_close(model.bias.detach(), bias)
    # the gradient cancels the decay
    torch.testing.assert_close(model.weight.detach(), weight)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    optim = Optim(lr=1.0, warmup=4)
    assert [learning_rate(step, 10, optim) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_follows_its_formula() -> None:
    optim = Optim(lr=2.0, warmup=4)
    for step in range(4, 10):
        expected = 2.0 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))
        assert learning_rate(step, 10, optim) == pytest.approx(expected)
    assert learning_rate(10, 10, optim) == 0


def test_const_stays_at_the_peak() -> None:
    optim = Optim(lr=2.0, warmup=4, lr_scheduler="const")
    assert [learning_rate(step, 10, optim) for step in (4, 9)] == [2.0, 2.0]


def test_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    assert learning_rate(9, 10, Optim(lr=1.0, warmup=10)) == 1.0
    assert learning_rate(10, 10, Optim(lr=1.0, warmup=10)) == 1.0


def test_buffers_of_batch_norm_come_back_after_a_poisoned_forward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    buffers = Buffers(model)
    model(torch.randn(2, 3, 4, 4))
    before = {name: x.clone() for name, x in model.named_buffers()}
    buffers.keep()
    model(torch.full((2, 3, 4, 4), math.nan))
    assert model[1].running_mean.isnan().all() and model[1].num_batches_tracked == 2
    buffers.restore()
    for name, x in model.named_buffers():
        assert torch.equal(x, before[name]) and x.dtype == before[name].dtype, name
    assert model[1].num_batches_tracked == 1
