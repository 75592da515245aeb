# SPDX-License-Identifier: Apache-2.0
"""TinyCLIP's published checkpoints, as weights of open_clip's names.

Their image tensors stand under ``_image_encoder.``, those of the text under ``_text_encoder.``, the
scale under ``_logit_scale.``, each with ``module.`` behind it where it was trained on several GPUs.
After a cut every tensor of a tower is there twice, under an ``..._without_ddp.`` alias as well.
Mask parameters may be left over. Training files hold the command line's ``argparse.Namespace``
beside the weights, which is all but tensors that is allowed to be unpickled here.
"""

import argparse
import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdengine.models.build import build_from_spec
from kdengine.models.pruning.ragged import RaggedShape, tower_shape
from kdengine.models.source import resolve
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import Student

HEAD_WIDTH = 64
_PREFIX = re.compile(r"^(module\.)?_(image_encoder|text_encoder|logit_scale)\.(module\.)?")


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The weights of a published checkpoint under open_clip's names, fp32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other things than tensors and a command line, or no TinyCLIP.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"convert: no checkpoint file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            whole: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"convert: {path} cannot be read as tensors and a command line, and nothing else is "
            f"unpickled: {' '.join(str(error).split())[:300]}"
        ) from error
    tensors = whole.get("state_dict", whole) if isinstance(whole, dict) else {}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not _PREFIX.match(name) or "l0_module" in name or not isinstance(value, Tensor):
            continue
        if not value.numel():
            # of a sublayer without units
            continue
        plain = _PREFIX.sub("", name)
        value = value.float() if value.is_floating_point() else value
        if plain in found and not torch.equal(found[plain], value):
            raise ValueError(f"convert: {path}: {plain} is there twice, with different values")
        found[plain] = value
    # a buffer that open_clip makes itself
    found.pop("attn_mask", None)
    if "logit_scale" not in found or not any(name.startswith("visual.") for name in found):
        raise ValueError(
            f"convert: {path} holds no TinyCLIP: expected tensors under _image_encoder., "
            f"_text_encoder. and _logit_scale.; there are {', '.join(list(tensors)[:4]) or 'none'}"
        )
    found["logit_scale"] = found["logit_scale"].reshape(1)
    return found


def released_student(path: str | Path, model: str) -> Student:
    """A published model in evaluation mode.

    Args:
        path: of the checkpoint.
        model: the configuration it was trained with; of an automatically pruned one the whole
            model it was pruned from, whose sizes are then read from the tensors.

    Raises:
        FileNotFoundError, ValueError: see ``read_released`` and ``resolve``; or the tensors are not
            those of the configuration, nor of a pruned one.
    """
    tensors = read_released(path)
    spec = resolve("student", model).spec
    with torch.device("meta"):
        whole = build_from_spec(spec).clip
    ragged = {}
    for tower in ("image", "text"):
        found = shape_of(tensors, tower)
        home: Any = whole.visual if tower == "image" else whole
        if (
            found is not None
            and hasattr(home, "transformer")
            and found != tower_shape(whole, tower)
        ):  # type: ignore[arg-type]
            ragged[tower] = found.to_dict()
    if ragged:
        config = copy.deepcopy(dict(spec.model_cfg))
        spec = dataclasses.replace(spec, model_cfg={**config, "ragged": ragged})
    return _loaded(spec, tensors, path)


def shape_of(tensors: dict[str, Tensor], tower: str) -> RaggedShape | None:
    """The sizes of a transformer tower, read from its tensors; None for a ResNet."""
    prefix = "visual." if tower == "image" else ""
    position = tensors.get(f"{prefix}positional_embedding")
    numbers = [
        int(match[1])
        for name in tensors
        if (match := re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.", name))
    ]
    if position is None or not numbers:
        return None

    def rows(name: str) -> int:
        return len(tensors[name]) if name in tensors else 0

    blocks = [f"{prefix}transformer.resblocks.{n}" for n in range(max(numbers) + 1)]
    return RaggedShape(
        width=position.shape[-1],
        head_width=HEAD_WIDTH,
        heads=tuple(rows(f"{b}.attn.in_proj_bias") // (3 * HEAD_WIDTH) for b in blocks),
        neurons=tuple(rows(f"{b}.mlp.c_fc.bias") for b in blocks),
    )


def _loaded(spec: TowerSpec, tensors: dict[str, Tensor], path: str | Path) -> Student:
    tower = build_from_spec(spec).eval()
    wanted = tower.clip.state_dict()
    for name, value in wanted.items():
        # upstream drops the bias that a layer without heads adds
        if name.endswith("attn.out_proj.bias") and name not in tensors:
            tensors[name] = torch.zeros_like(value)
    missing = sorted(set(wanted) - set(tensors))
    unknown = sorted(set(tensors) - set(wanted))
    shapes = [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape]
    if missing or unknown or shapes:
        told = {"missing": missing, "unknown": unknown, "of another shape": shapes}
        listed = "; ".join(
            f"{what}: {', '.join(names[:4])}" for what, names in told.items() if names
        )
        raise ValueError(
            f"convert: {path} does not fit {spec.name} ({listed}); give the configuration that it "
            "was trained with, of a pruned one that of the whole model"
        )
    tower.clip.load_state_dict(tensors)
    return Student(tower, spec)
