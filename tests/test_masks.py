# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete masks: the published numbers, draws, budget, final choice."""

import pytest
import torch
from torch import Tensor

from kdengine.models.pruning.masks import L0Masks, expected_parameters, num_parameters
from kdengine.models.pruning.ragged import RaggedShape

VIT_B = RaggedShape(width=768, head_width=64, heads=(12,) * 12, neurons=(3072,) * 12)
TEXT = RaggedShape(width=512, head_width=64, heads=(8,) * 12, neurons=(2048,) * 12)
SMALL = RaggedShape(width=96, head_width=16, heads=(6,) * 4, neurons=(384,) * 4)


def masks(log_alpha: float | None = None, shape: RaggedShape = SMALL, seed: int = 0) -> L0Masks:
    found = L0Masks({"image": shape}, seed=seed)
    if log_alpha is not None:
        for value in found.log_alpha.values():
            torch.nn.init.constant_(value, log_alpha)
    return found


def randomised(seed: int = 0) -> L0Masks:
    found, generator = masks(seed=seed), torch.Generator().manual_seed(seed)
    for value in found.log_alpha.values():
        value.data = 3 * torch.randn(value.shape, generator=generator)
    return found


def gone(one: L0Masks, factors: dict[str, Tensor]) -> float:
    """The share of the parameters that factors of 0 take away, counted unit by unit."""
    left = 0
    for tower, shape in one.shapes.items():
        channels = int(factors[f"{tower}.channels"].count_nonzero())
        for n in range(len(shape.heads)):
            inner = shape.head_width * int(factors[f"{tower}.{n}.heads"].count_nonzero())
            neurons = int(factors[f"{tower}.{n}.neurons"].count_nonzero())
            # query, key, value and output; the two layers of the feed-forward network
            left += 3 * inner * (channels + 1) + channels * (inner + 1)
            left += neurons * (channels + 1) + channels * (neurons + 1)
    return 1 - left / one.original


def test_sizes_of_the_published_towers() -> None:
    assert num_parameters(VIT_B) == 85_017_600
    assert num_parameters(TEXT) == 37_804_032


def test_sizes_are_those_of_the_modules() -> None:
    from kdengine.models import build_student
    from kdengine.models.pruning.ragged import install_ragged

    shape = RaggedShape(width=40, head_width=16, heads=(2, 0, 1), neurons=(7, 3, 0))
    clip = build_student("ViT-Pico-32", seed=0).tower.clip
    install_ragged(clip, "image", shape)
    blocks = clip.visual.transformer.resblocks.named_parameters()
    assert num_parameters(shape) == sum(p.numel() for name, p in blocks if ".ln_" not in name)


@pytest.mark.parametrize(("log_alpha", "wanted"), [(10.0, 0.000560), (4.60517, 0.004571)])
def test_published_expected_sparsity(log_alpha: float, wanted: float) -> None:
    found = float(masks(log_alpha, VIT_B).expected_sparsity().detach())
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("log_alpha", "opened", "factor"),
    [
        (0.5, 0.8908, 0.6456),
        (0.0, 0.8318, 0.5),
        (-1.6, 0.4996, 0.1279),
        (-4.605, 0.0471, 0.0040),
        (4.605, 0.99798, 0.99603),
    ],
)
def test_published_values_of_a_unit(log_alpha: float, opened: float, factor: float) -> None:
    one = masks(log_alpha)
    assert float(one.open_probability(torch.tensor(log_alpha))) == pytest.approx(opened, abs=6e-5)
    # nothing is to be removed: every factor is the soft one
    stay = one.final_factors(0.0)
    assert stay["image.channels"] == pytest.approx(factor, abs=6e-5)


def test_draws_have_the_distribution() -> None:
    one = masks(0.3, RaggedShape(width=200_000, head_width=1, heads=(1,), neurons=(1,)))
    drawn = one.draw(3)["image.channels"]
    share = float((drawn > 0).double().mean())
    assert share == pytest.approx(float(one.open_probability(torch.tensor(0.3))), abs=4e-3)
    # sigmoid(log_alpha + T log(-a / b)), by symmetry
    whole = float((drawn == 1).double().mean())
    assert whole == pytest.approx(float(torch.tensor(0.3 - 1.5986).sigmoid()), abs=4e-3)


def test_a_draw_is_told_by_seed_and_step() -> None:
    def all_of(one: L0Masks, step: int) -> Tensor:
        return torch.cat(list(one.draw(step).values()))

    one, other = randomised(), randomised()
    torch.rand(7)
    assert torch.equal(all_of(one, 5), all_of(other, 5))
    assert not torch.equal(all_of(one, 5), all_of(one, 6))
    other.seed = 1
    assert not torch.equal(all_of(one, 5), all_of(other, 5))
    # two groups of one size differ as well
    drawn = masks(0.0).draw(0)
    assert not torch.equal(drawn["image.0.neurons"], drawn["image.1.neurons"])


def test_a_draw_has_the_gradient_of_its_formula() -> None:
    one = randomised()
    for value in one.log_alpha.values():
        value.data = value.data.double()
    name = "image_neurons"
    total = sum(x.sum() for group, x in one.draw(2).items() if group.endswith("neurons"))
    (found,) = torch.autograd.grad(total, one.log_alpha[name])
    drawn = torch.cat([x for group, x in one.draw(2).items() if group.endswith("neurons")])
    inside = (drawn > 0) & (drawn < 1)
    soft = (drawn + 0.1) / 1.2
    wanted = torch.where(inside, soft * (1 - soft) * 1.2 * 1.5, 0)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-9)
    assert inside.any() and not inside.all()


def test_expected_size_is_the_mean_over_draws() -> None:
    shape = RaggedShape(width=300, head_width=8, heads=(40, 30), neurons=(500, 300))
    one = L0Masks({"text": shape})
    generator = torch.Generator().manual_seed(0)
    for value in one.log_alpha.values():
        value.data = torch.randn(value.shape, generator=generator)
    opened = {
        kind: one.open_probability(one.log_alpha[f"text_{kind}"])
        for kind in ("channels", "heads", "neurons")
    }
    found = float(expected_parameters(shape, opened).detach())
    counts = []
    for step in range(200):
        on = {group: (x > 0).double() for group, x in one.draw(step).items()}
        heads = on["text.0.heads"].sum() + on["text.1.heads"].sum()
        share = on["text.0.heads"].mean() + on["text.1.heads"].mean()
        neurons = on["text.0.neurons"].sum() + on["text.1.neurons"].sum()
        counts.append(float(on["text.channels"].sum() * (32 * heads + 4 * share + 2 * neurons)))
    assert found == pytest.approx(sum(counts) / len(counts), rel=5e-3)


def test_the_penalty_pulls_from_both_sides() -> None:
    one = randomised()
    now = float(one.expected_sparsity())
    below, above = one.penalty(now + 0.1), one.penalty(now - 0.1)
    assert float(below) == pytest.approx(10 * 0.1 + 10 * 0.01, rel=1e-4)
    assert float(above) == pytest.approx(-10 * 0.1 + 10 * 0.01, rel=1e-4)
    one.penalty(now - 0.1).backward()
    # too much is gone: ascent lowers the linear multiplier
    assert float(one.linear.grad) == pytest.approx(-0.1, rel=1e-4)
    assert float(one.square.grad) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_the_final_choice_meets_the_budget(target: float) -> None:
    one = L0Masks({"image": VIT_B, "text": TEXT})
    generator = torch.Generator().manual_seed(1)
    for value in one.log_alpha.values():
        value.data = 2 * torch.randn(value.shape, generator=generator)
    factors = one.final_factors(target)
    assert gone(one, factors) == pytest.approx(target, abs=1e-3)
    # the best of a group stay
    log_alpha, factor = one.log_alpha["image_channels"].detach(), factors["image.channels"]
    assert log_alpha[factor > 0].min() >= log_alpha[factor == 0].max()
    assert factor.max() < 1


def test_ascent_on_a_toy_task_reaches_its_target() -> None:
    """Random linear pressure to keep units against the budget, as a training would be."""
    one, generator = masks(), torch.Generator().manual_seed(0)
    worth = {k: 0.002 * torch.rand(v.shape, generator=generator) for k, v in one.log_alpha.items()}
    descend = torch.optim.AdamW(one.log_alpha.values(), lr=0.02, weight_decay=0)
    ascend = torch.optim.AdamW(one.multipliers(), lr=0.02, weight_decay=0, maximize=True)
    for step in range(1200):
        drawn = one.draw(step)
        kept = torch.cat([x for group, x in drawn.items() if group.endswith("neurons")])
        channels = drawn["image.channels"]
        task = -(kept * worth["image_neurons"]).sum() - (channels * worth["image_channels"]).sum()
        (task + one.penalty(0.5 * min(1, step / 400))).backward()
        for optimizer in (descend, ascend):
            optimizer.step()
            optimizer.zero_grad()
        one.clamp_()
    assert float(one.expected_sparsity()) == pytest.approx(0.5, abs=0.03)
    assert gone(one, one.final_factors(0.5)) == pytest.approx(0.5, abs=5e-3)
    # neurons that are worth more stay
    kept = torch.cat(
        [x for group, x in one.final_factors(0.5).items() if group.endswith("neurons")]
    )
    value = worth["image_neurons"]
    assert value[kept > 0].mean() > value[kept == 0].mean()
