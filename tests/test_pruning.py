# SPDX-License-Identifier: Apache-2.0
"""Masks around a student: one draw for all ranks and micro-batches, the cut, what is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.config import Prune
from kdengine.models import Student, build_from_spec, build_student
from kdengine.pruning import Pruning, lacking, original_parameters


def make(folder: Path, name: str = "model") -> Student:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return build_student(str(path), seed=0)


def batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 49407, (8, 8), generator=generator)
    return image[rows], tokens[rows]


def loss_of(student: Student, image: Tensor, tokens: Tensor) -> Tensor:
    """A sum over pairs, so that parts of a batch add up."""
    found = student.tower(image, tokens)
    return -F.cosine_similarity(found.image, found.text).sum()


def test_parts_of_a_batch_give_the_masks_one_gradient(tmp_path: Path) -> None:
    states = []
    for parts in ([slice(None)], [slice(0, 3), slice(3, 8)]):
        student = make(tmp_path)
        pruning = Pruning(student, Prune(target=0.5, warmup=2))
        for step in range(3):
            pruning.begin(step)
            for rows in parts:
                loss_of(student, *batch(rows)).backward()
            pruning.finish(step, applied=True)
        states.append(pruning.state_dict())
    for name, value in states[0]["masks"].items():
        torch.testing.assert_close(states[1]["masks"][name], value, rtol=1e-5, atol=1e-5)


def _on_rank(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    group = torch.distributed.group.WORLD if world_size > 1 else None
    student = make(folder, f"model{world_size}-{rank}")
    pruning = Pruning(student, Prune(target=0.5, warmup=2), group=group)
    for step in range(3):
        pruning.begin(step)
        rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        (world_size * loss_of(student, *batch(rows))).backward()
        pruning.finish(step, applied=True)
    return pruning.masks.state_dict()


def test_ranks_share_draws_and_gradients(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    whole = _on_rank(0, 1, tmp_path)
    first, second = run_ranks(_on_rank, 2, tmp_path)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def test_a_skipped_step_leaves_the_masks_alone(tmp_path: Path) -> None:
    student = make(tmp_path)
    pruning = Pruning(student, Prune(target=0.5))
    before = {name: x.clone() for name, x in pruning.masks.state_dict().items()}
    pruning.begin(0)
    (loss_of(student, *batch()) * torch.nan).backward()
    pruning.finish(0, applied=False)
    assert all(torch.equal(x, before[name]) for name, x in pruning.masks.state_dict().items())


def test_training_meets_the_budget_and_the_view_is_the_gated_model(tmp_path: Path) -> None:
    student = make(tmp_path)
    pruning = Pruning(student, Prune(target=0.4, warmup=100))
    optimizer = torch.optim.AdamW(student.tower.parameters(), lr=1e-3)
    for step in range(250):
        pruning.begin(step)
        loss_of(student, *batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruning.finish(step, applied=True)
    assert pruning.told(250)["sparsity_target"] == pytest.approx(0.4)
    student.tower.eval()
    pruning.masks.set_gates(pruning.gates, pruning.masks.final_factors(0.4))
    wanted = student.tower(*batch())
    weights, spec = pruning.view(student.tower.clip.state_dict())
    tower = build_from_spec(spec).eval()
    tower.clip.load_state_dict(weights)
    found = tower(*batch())
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-4, atol=1e-4)
    gone = lacking(spec)
    assert gone == pytest.approx(0.4, abs=5e-3)
    # the next stage counts from the original, and must take more
    after = Student(tower, spec)
    assert original_parameters(spec) == original_parameters(student.spec)
    with pytest.raises(ValueError, match="lacks already"):
        Pruning(after, Prune(target=0.3))
    assert Pruning(after, Prune(target=0.7)).target(0) == pytest.approx(gone, abs=1e-3)


def test_masks_go_on_from_what_was_saved(tmp_path: Path) -> None:
    found = []
    for stop in (None, 2):
        student = make(tmp_path)
        pruning = Pruning(student, Prune(target=0.5, warmup=3))
        for step in range(5):
            if step == stop:
                torch.save(pruning.state_dict(), tmp_path / "masks.pt")
                student = make(tmp_path)
                pruning = Pruning(student, Prune(target=0.5, warmup=3))
                pruning.load_state_dict(torch.load(tmp_path / "masks.pt", weights_only=True))
            pruning.begin(step)
            loss_of(student, *batch()).backward()
            pruning.finish(step, applied=True)
        found.append(pruning.masks.state_dict())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_a_tower_without_transformer_is_refused() -> None:
    for name in ("RN-Femto-64", "Swin-T"):
        with pytest.raises(ValueError, match=f"{name} cannot be pruned.* the image tower is no tr"):
            Pruning(build_student(name, seed=0), Prune(target=0.5))
