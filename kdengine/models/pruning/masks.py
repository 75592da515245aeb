# SPDX-License-Identifier: Apache-2.0
"""Learnable masks over channels, heads and neurons with a budget (TinyCLIP, section 3.2; CoFi).

One log-alpha a unit. In training a factor is drawn from the hard-concrete distribution (Louizos et
al. 2018), which is exactly 0 or 1 with positive probability:

    u ~ U(eps, 1 - eps),  s = sigmoid((log u - log(1 - u) + log_alpha) / T)
    z = clip(s (b - a) + a, 0, 1)                    a = -0.1, b = 1.1, T = 2/3
    P(z > 0) = sigmoid(log_alpha - T log(-a / b))

and the expected number of parameters enters the loss through a Lagrangian, ascended in l1 and l2:

    l1 (q - e) + l2 (q - e)^2,    e = 1 - expected parameters / parameters of the original

Decisions, where the released code differs from its paper or from what it means:

* The penalty has two sides, as the paper writes it; the released hinge lets the size overshoot.
* One draw counts for all ranks and for the whole step, told by seed and step alone.
* What a stage removed is gone: the next one starts from the cut model, with targets that are shares
  of the original. Released is a tower blown up again, whose zero units come back to life.
* The final choice fits the budget: see ``final_factors``.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdengine.models.pruning.ragged import Gates, RaggedShape

LOW, HIGH, TEMPERATURE, EPS = -0.1, 1.1, 2 / 3, 1e-6
START, MULTIPLIER_START = 10.0, 10.0
# after every step
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(0.01), math.log(100)
# of log-alpha, in the factor that stays when nothing is drawn
CERTAINTY = 0.8


def num_parameters(shape: RaggedShape) -> int:
    """The weights and biases of a tower's attention and feed-forward networks, counted.

    Norms, embeddings and projections are left out, as in TinyCLIP: 85,017,600 for ViT-B.
    """
    inner = 4 * shape.head_width * sum(shape.heads) + 2 * sum(shape.neurons)
    biases = 3 * shape.head_width * sum(shape.heads) + sum(shape.neurons)
    return shape.width * inner + biases + 2 * len(shape.heads) * shape.width


def expected_parameters(shape: RaggedShape, opened: Mapping[str, Tensor]) -> Tensor:
    """The expected number, from each unit's probability to be open, by kind; 0-D.

    ``C (4 w sum_heads + 4 sum_layers (open heads / heads) + 2 sum_neurons)`` with C the sum over
    channels: the released formula, which leaves the biases of the feed-forward networks out
    (0.05 % of ViT-B).
    """
    heads, channels = opened["heads"], opened["channels"].sum()
    share = sum(
        part.sum() / max(size, 1)
        for part, size in zip(heads.split(list(shape.heads)), shape.heads, strict=True)
    )
    return channels * (4 * shape.head_width * heads.sum() + 4 * share + 2 * opened["neurons"].sum())


class L0Masks(nn.Module):
    """Masks of some towers under one budget.

    Args:
        shapes: of the towers as they are, by ``image`` and ``text``.
        original: parameters of the original towers together, by ``num_parameters``: shares that
            are removed count from there. By default those of ``shapes``.
        seed: of the draws.
    """

    def __init__(
        self, shapes: Mapping[str, RaggedShape], *, original: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.shapes, self.seed = dict(shapes), seed
        self.original = original or sum(map(num_parameters, shapes.values()))
        self.log_alpha = nn.ParameterDict()
        for tower, shape in self.shapes.items():
            for kind, sizes in _kinds(shape).items():
                self.log_alpha[f"{tower}_{kind}"] = nn.Parameter(torch.full((sum(sizes),), START))
        self.linear = nn.Parameter(torch.tensor([MULTIPLIER_START]))
        self.square = nn.Parameter(torch.tensor([MULTIPLIER_START]))

    def multipliers(self) -> list[nn.Parameter]:
        """Those of the Lagrangian, to be ascended."""
        return [self.linear, self.square]

    def draw(self, step: int) -> dict[str, Tensor]:
        """The factors of one step, by group, with gradients to the log-alphas.

        The same for all that have the seed, the step and the kind of device.
        """
        found = {}
        for number, (name, log_alpha) in enumerate(self.log_alpha.items()):
            generator = torch.Generator(log_alpha.device)
            generator.manual_seed((self.seed * 1_000_003 + step) * 8 + number)
            noise = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
            noise = noise * (1 - 2 * EPS) + EPS
            soft = torch.sigmoid((noise.logit() + log_alpha) / TEMPERATURE)
            found[name] = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        return self._by_group(found)

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """``P(z > 0)``."""
        shifted = log_alpha - TEMPERATURE * math.log(-LOW / HIGH)
        return shifted.sigmoid().clamp(EPS, 1 - EPS)

    def expected_sparsity(self) -> Tensor:
        """``e``, the share of the original's parameters that is expected to be gone; 0-D."""
        expected = sum(
            expected_parameters(shape, {kind: self._open(tower, kind) for kind in _kinds(shape)})
            for tower, shape in self.shapes.items()
        )
        assert isinstance(expected, Tensor)
        return 1 - expected / self.original

    def penalty(self, target: float) -> Tensor:
        """The Lagrangian at a target share; 0-D, with gradients to log-alphas and multipliers."""
        missing = target - self.expected_sparsity()
        return (self.linear * missing + self.square * missing.square()).squeeze()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the log-alphas where they can move; after every step."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

    @torch.no_grad()
    def final_factors(self, target: float) -> dict[str, Tensor]:
        """The factors that stay, by group, on the CPU: the target share of parameters is gone.

        Of each group the ``round(sum P(z > 0))`` units with the largest log-alphas stay, with
        ``sigmoid(0.8 log_alpha / T)``, and all log-alphas are shifted by the one number that brings
        the count to the target (bisection; heads and neurons are whole, so it is met to within
        about a unit). Of the channels at least one stays.
        """
        # a device would be waited for hundreds of times
        groups = self._by_group({name: x.detach().cpu() for name, x in self.log_alpha.items()})
        low, high = -40.0, 40.0
        for _ in range(60):
            middle = (low + high) / 2
            if self._sparsity_of(self._counts(groups, middle)) < target:
                # too much is left
                high = middle
            else:
                low = middle
        both = [self._counts(groups, shift) for shift in (low, high)]
        counts = min(both, key=lambda one: abs(self._sparsity_of(one) - target))
        found = {}
        for group, log_alpha in groups.items():
            # stable: of equal log-alphas the first
            best = log_alpha.sort(descending=True, stable=True).indices[: counts[group]]
            factor = (CERTAINTY * log_alpha / TEMPERATURE).sigmoid()
            found[group] = torch.zeros_like(factor).index_copy(0, best, factor[best])
        return found

    def set_gates(self, gates: Mapping[str, Gates], factors: Mapping[str, Tensor]) -> None:
        """Put factors, by group, into the gates of the towers."""
        for tower, shape in self.shapes.items():
            own = gates[tower]
            own.channels = factors[f"{tower}.channels"]
            own.heads = [factors[f"{tower}.{n}.heads"] for n in range(len(shape.heads))]
            own.neurons = [factors[f"{tower}.{n}.neurons"] for n in range(len(shape.heads))]

    def _open(self, tower: str, kind: str) -> Tensor:
        return self.open_probability(self.log_alpha[f"{tower}_{kind}"])

    def _by_group(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor a layer, by the groups of ``axes``."""
        found = {}
        for tower, shape in self.shapes.items():
            for kind, sizes in _kinds(shape).items():
                parts = values[f"{tower}_{kind}"].split(sizes)
                if kind == "channels":
                    found[f"{tower}.channels"] = parts[0]
                    continue
                found |= {f"{tower}.{n}.{kind}": part for n, part in enumerate(parts)}
        return found

    def _counts(self, groups: Mapping[str, Tensor], shift: float) -> dict[str, int]:
        """How many units of each group stay, with all log-alphas shifted."""
        found = {}
        for group, log_alpha in groups.items():
            count = int(self.open_probability(log_alpha + shift).sum().round())
            found[group] = max(count, 1) if group.endswith("channels") else count
        return found

    def _sparsity_of(self, counts: Mapping[str, int]) -> float:
        left = 0
        for tower, shape in self.shapes.items():
            layers = range(len(shape.heads))
            left += num_parameters(
                RaggedShape(
                    width=counts[f"{tower}.channels"],
                    head_width=shape.head_width,
                    heads=tuple(counts[f"{tower}.{n}.heads"] for n in layers),
                    neurons=tuple(counts[f"{tower}.{n}.neurons"] for n in layers),
                )
            )
        return 1 - left / self.original


def _kinds(shape: RaggedShape) -> dict[str, list[int]]:
    return {
        "channels": [shape.width],
        "heads": list(shape.heads),
        "neurons": list(shape.neurons),
    }
