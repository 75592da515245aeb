# SPDX-License-Identifier: Apache-2.0
"""Students and teachers from a name, a folder or a configuration file.

The towers are made from open_clip's classes directly: nothing is downloaded unless the user asked
for published weights, and no base weights of a tower slip in.
"""

import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from kdengine import LOCAL_DIR
from kdengine.models.bridge import build_bridge
from kdengine.models.prompted import install_all
from kdengine.models.pruning.axes import canonical, tower_of
from kdengine.models.pruning.ragged import RaggedShape, Tower, install_ragged
from kdengine.models.source import Source, resolve
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import Student, Teacher, TwoTower

logger = logging.getLogger(__name__)


def build_student(
    model: str,
    pretrained: str | None = None,
    *,
    grad_checkpointing: bool = False,
    seed: int | None = None,
) -> Student:
    """Build a model to train, in fp32 on the CPU, in training mode.

    Its log scale has shape [1]: DeepSpeed cannot broadcast 0-D parameters. A sigmoid model's bias
    is frozen, because no softmax loss has a gradient for it.

    Args:
        model: one of ``student_configs()``, an open_clip architecture, ``local-dir:PATH``,
            ``hf-hub:ORG/NAME``, or the path of a JSON file.
        pretrained: open_clip tag or checkpoint file; None starts from random weights (from the
            folder's weights for ``local-dir:``).
        grad_checkpointing: recompute activations in the backward pass.
        seed: of the random weights, whatever was drawn before; None uses torch's generator.

    Returns:
        Student(tower, spec).

    Raises:
        ValueError: unknown name or tag, wrong GELU, unusable configuration or checkpoint.
        FileNotFoundError: a named file or folder is missing.
        RuntimeError: a download failed.
    """
    source = resolve("student", model, pretrained)
    source = dataclasses.replace(source, spec=_trained_preprocess(source.spec))
    if "multimodal_cfg" in source.spec.model_cfg:
        raise ValueError(
            f"student {model}: it is a CoCa model; its caption decoder would get no gradient; "
            "take a two-tower configuration (CoCa models can be teachers)"
        )
    if seed is None:
        tower = _build("student", source)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = _build("student", source)
    if grad_checkpointing:
        _checkpoint_activations(tower, model)
    return Student(tower.train(), source.spec)


def build_teacher(
    model: str,
    pretrained: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    allow_random: bool = False,
) -> Teacher:
    """Build a frozen model to learn from. torch's random state is left as it was.

    Args:
        model: as for ``build_student``; width, resolution, mean, std and tokenizer are its own.
        pretrained: open_clip tag or checkpoint file.
        dtype: of weights and embeddings; batch norms and the scale stay fp32.
        device: where it goes.
        allow_random: accept a model without weights (benchmarks).

    Returns:
        A callable ``teacher(image, tokens) -> Features``.

    Raises:
        ValueError: also when there are no weights.
    """
    source = resolve("teacher", model, pretrained)
    if source.checkpoint is None and not allow_random:
        raise ValueError(
            f"teacher {model}: without pretrained it is random, and nothing can be learned from "
            "it; give an open_clip tag or a checkpoint file (--distill.distill-pretrained), or "
            "local-dir:PATH as the teacher"
        )
    with torch.random.fork_rng(devices=[]):
        tower = _build("teacher", source, clamp_scale=False)
    return Teacher(tower, source.spec, dtype).to(device)


def load_model(model: str | Path, pretrained: str | None = None) -> Student:
    """Load a model for use: an exported folder, or anything ``build_student`` takes.

    Returns:
        Student(tower, spec) in evaluation mode, fp32, on the CPU, with its scale as it was trained.

    Raises:
        ValueError: also when there are no weights.
    """
    name = str(model)
    if ":" not in name and Path(name).is_dir():
        name = LOCAL_DIR + name
    source = resolve("model", name, pretrained)
    if source.checkpoint is None:
        raise ValueError(
            f"model {name}: it has no weights; give the folder of an export, or a tag or a file of "
            f"weights with the architecture: {name}@TAG (in Python pretrained)"
        )
    with torch.random.fork_rng(devices=[]):
        tower = _build("model", source, clamp_scale=False)
    return Student(tower.eval(), source.spec)


def build_from_spec(spec: TowerSpec, *, grad_checkpointing: bool = False) -> TwoTower:
    """The student that a spec describes, with random weights, ready for a state dict."""
    tower = _build("student", Source(spec, None))
    if grad_checkpointing:
        _checkpoint_activations(tower, spec.name)
    return tower.train()


def _build(role: str, source: Source, *, clamp_scale: bool = True) -> TwoTower:
    name = source.spec.name
    config: dict[str, Any] = copy.deepcopy(dict(source.spec.model_cfg))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    custom = config.pop("custom_text", False)
    ragged, prompts = config.pop("ragged", {}), config.pop("prompts", {})
    bridge = config.pop("bridge", None)
    cls = open_clip.CLIP
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
        custom = True
    if custom:
        cls = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        clip = cls(**(config | {"nonscalar_logit_scale": True}))
        if bridge:
            # the image tower is of another model than the text tower
            clip.visual = _build_vision_tower(bridge["width"], vision, bridge["quick_gelu"])
    except Exception as error:
        raise ValueError(
            f"{role} {name}: open_clip {open_clip.__version__} cannot build it: {error}"
        ) from error
    for tower, sizes in ragged.items():
        shape = RaggedShape.from_dict(sizes)
        install_ragged(clip, tower, shape)
        _randomise(clip, tower, shape)
    install_all(clip, prompts)
    if bridge:
        clip.visual.bridge = build_bridge(config["embed_dim"], bridge)
    if clip.logit_bias is not None:
        clip.logit_bias.requires_grad_(False)
    if source.checkpoint is not None:
        _load(role, clip, name, source.checkpoint)
    return TwoTower(clip, clamp_scale=clamp_scale)


def _randomise(clip: nn.Module, tower: Tower, shape: RaggedShape) -> None:
    """Random weights, as open_clip draws those of its text transformer."""
    narrow, depth = shape.width**-0.5, (2 * len(shape.heads)) ** -0.5
    deviations = {
        r"in_proj_weight|class_embedding|visual\.positional_embedding|visual\.proj|"
        r"text_projection": narrow,
        r"(out_proj|c_proj)\.weight": narrow * depth,
        r"c_fc\.weight": (2 * shape.width) ** -0.5,
        r"token_embedding\.weight": 0.02,
        r"positional_embedding": 0.01,
    }
    for name, value in clip.named_parameters():
        name = canonical(name)
        if tower_of(name) != tower or name.startswith("logit_"):
            continue
        found = next((std for key, std in deviations.items() if re.search(f"({key})$", name)), None)
        with torch.no_grad():
            if found is not None:
                value.normal_(std=found)
            elif "conv1" not in name:
                value.fill_(1.0 if re.search(r"ln_\w+\.weight$", name) else 0.0)


def _load(role: str, clip: nn.Module, name: str, checkpoint: str) -> None:
    try:
        open_clip.load_checkpoint(clip, checkpoint)
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 600 else reason[:600] + " ..."
        raise ValueError(
            f"{role}: the checkpoint {checkpoint} does not fit {name}: {reason}; expected an "
            "open_clip state dict (.safetensors, or a torch file of tensors) of this configuration"
        ) from error


def _trained_preprocess(spec: TowerSpec) -> TowerSpec:
    """Students see bicubic crops of the shorter side, whatever their weights saw before."""
    wanted = dataclasses.replace(spec.preprocess, interpolation="bicubic", resize_mode="shortest")
    if wanted != spec.preprocess:
        logger.warning(
            "student %s: it was trained with %s, %s; it will be trained, evaluated and "
            "exported with bicubic, shortest",
            spec.name,
            spec.preprocess.interpolation,
            spec.preprocess.resize_mode,
        )
    return dataclasses.replace(spec, preprocess=wanted)


def _checkpoint_activations(tower: TwoTower, name: str) -> None:
    clip: Any = tower.clip
    if hasattr(clip.visual, "trunk"):
        try:
            # open_clip's own switch hides the refusal of a timm model
            clip.visual.trunk.set_grad_checkpointing(True)
        except Exception as error:
            raise ValueError(
                f"student {name}: its image tower has no gradient checkpointing ({error}); "
                "switch grad_checkpointing off (--model.no-grad-checkpointing)"
            ) from error
    elif type(clip.visual).__name__ == "ModifiedResNet":
        logger.warning(
            "student %s: open_clip's ResNet has no gradient checkpointing; only the text tower "
            "recomputes its activations",
            name,
        )
    clip.set_grad_checkpointing(True)
