# SPDX-License-Identifier: Apache-2.0
"""Automatic inheritance in a run (TinyCLIP, section 3.2): masks for a while, then the cut.

The masks live outside the engine, because their optimisers, of which one ascends, take other steps
than the student's, and neither weight decay nor the clipping of gradients is for them. They are
small, and equal on all ranks: gradients are averaged here.

A step: ``begin`` draws the factors and sets the gates; the engine's backward passes, however many,
add up the factors' gradients; ``finish`` takes these and the penalty's on to the log-alphas and the
multipliers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdengine import distributed
from kdengine.config import Prune
from kdengine.distributed import Group
from kdengine.models import Student, TowerSpec, build_from_spec
from kdengine.models.pruning.axes import canonical, model_axes
from kdengine.models.pruning.cut import Dense, cut
from kdengine.models.pruning.masks import L0Masks, num_parameters
from kdengine.models.pruning.ragged import Gates, RaggedShape, Tower, install_ragged, tower_shape

# allowed distance of the share that is gone from the target
BUDGET_TOLERANCE = 0.005
TOWERS: tuple[Tower, Tower] = ("image", "text")


class View(NamedTuple):
    """What is evaluated and exported: weights by open_clip's names, and what they are."""

    weights: dict[str, Tensor]
    spec: TowerSpec


class Pruning:
    """The masks of a student until its cut.

    Args:
        student: its towers, transformers, become gated in place; their weights stay.
        settings: target, length and learning rate.
        group: the ranks; None for one process.
        device: of the masks.
        seed: of the draws.

    Raises:
        ValueError: a tower is no transformer of open_clip's, the only ones that TinyCLIP masks, or
            less would be taken from the student than it lacks already.
    """

    def __init__(
        self,
        student: Student,
        settings: Prune,
        *,
        group: Group = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.settings, self.group, self.spec = settings, group, student.spec
        clip, weights = student.tower.clip, student.tower.clip.state_dict()
        self.shapes: dict[str, RaggedShape] = _shapes(student)
        original = original_parameters(student.spec)
        self.start = 1 - sum(map(num_parameters, self.shapes.values())) / original
        # a tensor that is in no table could not be cut later
        sizes = {canonical(name): tuple(x.shape) for name, x in weights.items()}
        model_axes(sizes, {tower: shape.head_width for tower, shape in self.shapes.items()})
        if settings.target <= self.start:
            raise ValueError(
                f"prune.target: expected more than the {self.start:.1%} of the original's "
                f"parameters that {student.spec.name} lacks already; got {settings.target:.1%}"
            )
        self.gates: dict[str, Gates] = {x: install_ragged(clip, x, self.shapes[x]) for x in TOWERS}
        clip.load_state_dict(weights)
        self.masks = L0Masks(self.shapes, original=original, seed=seed).to(device)
        options: dict[str, Any] = {"lr": settings.mask_lr, "weight_decay": 0.0}
        self.optimizers = [
            torch.optim.AdamW(self.masks.log_alpha.values(), **options),
            torch.optim.AdamW(self.masks.multipliers(), maximize=True, **options),
        ]
        self._drawn: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Draw the factors of a step and set the gates."""
        self._drawn = self.masks.draw(step)
        self._factors = {
            group: drawn.detach().requires_grad_() for group, drawn in self._drawn.items()
        }
        self.masks.set_gates(self.gates, self._factors)

    def finish(self, step: int, applied: bool) -> None:
        """Move log-alphas and multipliers by this step's gradients, unless it was skipped.

        Communication: one all-reduce of the factors' gradients.
        """
        if not applied:
            return
        gradients = [
            torch.zeros_like(factor) if factor.grad is None else factor.grad
            for factor in self._factors.values()
        ]
        flat = distributed.average(torch.cat(gradients), self.group)
        parts = flat.split([len(gradient) for gradient in gradients])
        torch.autograd.backward(list(self._drawn.values()), list(parts))
        self.masks.penalty(self.target(step)).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.masks.clamp_()

    def told(self, step: int) -> dict[str, float]:
        """For the log after so many steps: the share of the original's parameters expected to be
        gone, its target, and the linear multiplier.
        """
        return {
            "sparsity": float(self.masks.expected_sparsity().detach()),
            "sparsity_target": self.target(step - 1),
            "sparsity_multiplier": float(self.masks.linear.detach()),
        }

    def target(self, step: int) -> float:
        """The share that is to be gone at a step: from what lacks already, linearly."""
        done = min(1.0, (step + 1) / max(1, self.settings.warmup))
        return self.start + (self.settings.target - self.start) * done

    def view(self, weights: Mapping[str, Tensor], target: float | None = None) -> View:
        """The student without gates, as its cut would leave it now.

        Args:
            weights: of ``tower.clip``, whole, fp32.
            target: the share of the original's parameters to be gone; the last one by default.
        """
        share = self.settings.target if target is None else target
        dense: Dense = cut(weights, self.shapes, self.masks.final_factors(share))
        sizes = {tower: shape.to_dict() for tower, shape in dense.shapes.items()}
        config = {**self.spec.model_cfg, "ragged": sizes}
        return View(dense.tensors, dataclasses.replace(self.spec, model_cfg=config))

    def state_dict(self) -> dict[str, Any]:
        """Masks, multipliers and the state of their optimisers."""
        return {
            "masks": self.masks.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.masks.load_state_dict(state["masks"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def _shapes(student: Student) -> dict[str, RaggedShape]:
    try:
        return {tower: tower_shape(student.tower.clip, tower) for tower in TOWERS}
    except ValueError as error:
        raise ValueError(
            f"prune.target: {student.spec.name} cannot be pruned; masks are for a ViT and a text "
            f"transformer, both of open_clip ({error}); take such a student, or cut a "
            "ModifiedResNet by hand, with 'kdengine inherit'"
        ) from None


def lacking(spec: TowerSpec) -> float:
    """The share of the original's parameters that a model lacks, counted."""
    return 1 - _count(spec) / original_parameters(spec)


def original_parameters(spec: TowerSpec) -> int:
    """The parameters, see ``num_parameters``, of the towers before anything was cut from them."""
    config = {name: value for name, value in spec.model_cfg.items() if name != "ragged"}
    return _count(dataclasses.replace(spec, model_cfg=config))


def _count(spec: TowerSpec) -> int:
    with torch.device("meta"):
        clip = build_from_spec(spec).clip
    return sum(num_parameters(tower_shape(clip, tower)) for tower in TOWERS)
