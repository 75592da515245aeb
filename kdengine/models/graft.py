# SPDX-License-Identifier: Apache-2.0
"""Frozen models around prompts: a teacher with its own, a student in its teacher's space.

The student of a prompt distillation is its own image tower with prompts, a bridge into the
teacher's space, and the teacher's text tower, all in one open_clip model: whoever evaluates it
needs no teacher, and classes that it was not trained on have texts all the same. ``load_model``
loads its export; open_clip cannot.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdengine.models.build import build_from_spec
from kdengine.models.prompted import PromptShape, start_from_words, train_only
from kdengine.models.pruning.ragged import Tower
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import Student, Teacher

OWN = ("prompts", "bridge", "ragged")


def prompted(
    student: Student,
    shapes: Mapping[Tower, PromptShape],
    words: Tensor,
    *,
    seed: int,
    grad_checkpointing: bool = False,
) -> Student:
    """A frozen model with prompts to train; those of the text tower start from words.

    Shapes: words [tokens of the text tower], ids; see ``start_from_words``.

    Raises:
        ValueError: the model has prompts already, or a tower takes none.
    """
    _refuse_changed(student.spec)
    listed = {tower: shape.to_dict() for tower, shape in shapes.items()}
    spec = dataclasses.replace(
        student.spec, model_cfg={**student.spec.model_cfg, "prompts": listed}
    )
    made = _filled(spec, student.tower.clip.state_dict(), seed, grad_checkpointing)
    if "text" in shapes:
        start_from_words(made.tower.clip, words)
    train_only(made.tower.clip, list(shapes))
    return made


def grafted(
    student: Student,
    teacher: Teacher,
    shape: PromptShape,
    *,
    num_keys: int,
    divisor: float | None = None,
    seed: int,
    grad_checkpointing: bool = False,
) -> Student:
    """A frozen student with visual prompts, a bridge to train, and its teacher's text tower.

    Args:
        student: gives the image tower and the scale; its text tower is left behind.
        teacher: gives the text tower and the width of the embeddings.
        shape: of the prompts in the image tower.
        num_keys: see ``bridge.Bridge``.
        divisor: see ``bridge.EduAttention``.
        seed: of prompts and bridge.
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: the student has prompts already, or its image tower takes none.
    """
    _refuse_changed(student.spec)
    own, other = student.spec.model_cfg, teacher.spec.model_cfg
    config: dict[str, Any] = copy.deepcopy(
        {name: value for name, value in other.items() if name not in (*OWN, "init_logit_bias")}
    )
    config["vision_cfg"] = copy.deepcopy(own["vision_cfg"])
    config["prompts"] = {"image": shape.to_dict()}
    if text := other.get("prompts", {}).get("text"):
        config["prompts"]["text"] = dict(text)
    config["bridge"] = {
        "width": student.spec.embed_dim,
        "quick_gelu": bool(own.get("quick_gelu", False)),
        "num_keys": num_keys,
        "divisor": divisor,
    }
    spec = dataclasses.replace(
        student.spec,
        model_cfg=config,
        tokenizer=teacher.spec.tokenizer,
        context_length=teacher.spec.context_length,
        embed_dim=teacher.spec.embed_dim,
    )
    texts = teacher.tower.clip.state_dict()
    weights = {name: x for name, x in texts.items() if not name.startswith(("visual.", "logit_"))}
    for name, value in student.tower.clip.state_dict().items():
        if name.startswith("visual.") or name == "logit_scale":
            weights[name] = value
    made = _filled(spec, weights, seed, grad_checkpointing)
    train_only(made.tower.clip, ["image"])
    return made


def _filled(
    spec: TowerSpec, weights: Mapping[str, Tensor], seed: int, grad_checkpointing: bool
) -> Student:
    """The model of a spec with these weights; what they lack is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = build_from_spec(spec, grad_checkpointing=grad_checkpointing)
    found = tower.clip.load_state_dict(dict(weights), strict=False)
    lacking = [name for name in found.missing_keys if not _is_new(name)]
    assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
    return Student(tower, spec)


def _is_new(name: str) -> bool:
    return name.endswith("transformer.prompts") or name.startswith("visual.bridge.")


def _refuse_changed(spec: TowerSpec) -> None:
    if changed := [name for name in OWN if name in spec.model_cfg]:
        raise ValueError(
            f"student {spec.name}: prompts go into a model as open_clip has it, and this one has "
            f"{', '.join(changed)} of its own; name the model it was made from"
        )
