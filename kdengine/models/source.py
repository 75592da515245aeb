# SPDX-License-Identifier: Apache-2.0
"""From what the user typed to a configuration and a checkpoint file.

A model is one of our own configurations (``configs/*.json``), an open_clip architecture,
``local-dir:PATH``, ``hf-hub:ORG/NAME``, or the path of a JSON file. Only tags and ``hf-hub:`` use
the network.
"""

import copy
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from kdengine import LOCAL_DIR
from kdengine.models.spec import PreprocessSpec, TowerSpec, tokenizer_id

CONFIGS = Path(__file__).parent / "configs"
HUB = "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
# the order in which open_clip searches a folder
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Source:
    """A resolved model: its spec, and the file of its weights (None: random)."""

    spec: TowerSpec
    checkpoint: str | None


def student_configs() -> list[str]:
    """Names of the student configurations that ship with kdengine, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def resolve(role: str, model: str, pretrained: str | None = None) -> Source:
    """Find configuration, preprocessing and weights of a model.

    Args:
        role: what the model is to be, for messages: student, teacher or model.
        model: see the head of this module.
        pretrained: open_clip tag, or the path of a checkpoint file.

    Raises:
        FileNotFoundError: a folder, a configuration or a checkpoint is missing.
        ValueError: unknown name or tag, unusable configuration, or weights trained with the other
            GELU; the message names what would fit.
        RuntimeError: a download failed.
    """
    who = f"{role} {model}"
    preprocess: dict[str, Any] = {}
    checkpoint: str | None
    if model.startswith(LOCAL_DIR):
        folder = Path(model.removeprefix(LOCAL_DIR))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{who}: the folder {folder} does not exist; train that model first (a run that "
                f"ends writes its export/), or export it: 'kdengine export RUN {folder}'"
            )
        config, preprocess = _read_config(who, folder / CONFIG_FILE)
        checkpoint = _file(who, pretrained) if pretrained else _weights_in(who, folder)
    elif model.startswith(HUB):
        if pretrained:
            raise ValueError(
                f"{who}: it brings its own weights, got pretrained {pretrained!r} as well; leave "
                "that away"
            )
        hub = model.removeprefix(HUB)
        config, preprocess = _read_config(who, Path(_fetch(who, model, hub, CONFIG_FILE)))
        checkpoint = _fetch(who, model, hub, None)
    elif model.endswith(".json"):
        config, preprocess = _read_config(who, Path(model))
        checkpoint = _file(who, pretrained) if pretrained else None
    else:
        given, model = model, model.replace("/", "-")
        config = _named_config(who, given, model)
        checkpoint, preprocess = _named_weights(who, model, config, pretrained)
    return Source(_spec(who, model, pretrained, config, preprocess), checkpoint)


def _spec(
    who: str, name: str, pretrained: str | None, config: dict[str, Any], preprocess: dict[str, Any]
) -> TowerSpec:
    size = config["vision_cfg"].get("image_size", 224)
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1:
        raise ValueError(
            f"{who}: it takes images of {sides}; only square ones are supported; set "
            "vision_cfg.image_size to one number"
        )
    fields = {k: preprocess[k] for k in ("mean", "std") if preprocess.get(k)}
    kept = {k: tuple(float(x) for x in v) for k, v in fields.items()}
    kept |= {k: preprocess[k] for k in ("interpolation", "resize_mode") if preprocess.get(k)}
    return TowerSpec(
        name=name,
        pretrained=pretrained,
        model_cfg=config,
        preprocess=PreprocessSpec(size=int(sides[0]), **kept),  # type: ignore[arg-type]
        tokenizer=tokenizer_id(config, name),
        context_length=int(config["text_cfg"].get("context_length") or 77),
        embed_dim=int(config["embed_dim"]),
    )


def _read_config(who: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: no model configuration {path}; give {LOCAL_DIR}FOLDER with an {CONFIG_FILE} "
            f"in it, a JSON file, or a name; kdengine's own are {', '.join(student_configs())}"
        )
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}: {path} is not valid JSON: {error}") from None
    config = whole.get("model_cfg", whole) if isinstance(whole, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(
            f"{who}: {path} lacks {', '.join(missing)}; expected open_clip's model configuration, "
            f"bare or under 'model_cfg'"
        )
    return config, whole.get("preprocess_cfg") or {}


def _named_config(who: str, given: str, name: str) -> dict[str, Any]:
    own = CONFIGS / f"{name}.json"
    config = json.loads(own.read_text()) if own.is_file() else open_clip.get_model_config(name)
    if config is None:
        # open_clip's names may hold a slash, as in ViT-B/32; anything else with one is a path
        if os.path.exists(given):
            raise ValueError(
                f"{who}: this is a path; a folder is given as {LOCAL_DIR}{given}, a configuration "
                "as a file that ends in .json"
            )
        if "/" in given or given.startswith((".", "~")):
            raise FileNotFoundError(
                f"{who}: there is no such folder; give the folder of an export or of a run, "
                f"{LOCAL_DIR}FOLDER, a JSON file, or the name of a model"
            )
        names = [*student_configs(), *open_clip.list_models()]
        near = difflib.get_close_matches(name, names, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models();"
        raise ValueError(
            f"{who}: there is no model of this name; {hint} kdengine's own: "
            f"{', '.join(student_configs())}; or give {LOCAL_DIR}FOLDER or the path of a JSON file"
        )
    return copy.deepcopy(config)


def _named_weights(
    who: str, name: str, config: dict[str, Any], pretrained: str | None
) -> tuple[str | None, dict[str, Any]]:
    """The checkpoint of a registered name and the preprocessing that its tag states."""
    if not pretrained:
        return None, {}
    quick_gelu = bool(config.get("quick_gelu", False))
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag and os.path.isfile(pretrained):
        for model, known in open_clip.list_pretrained():
            # a published file under its own name: its tag tells the GELU it was trained with
            url = open_clip.get_pretrained_url(model, known)
            if url and Path(url).name == Path(pretrained).name and _base(model) == _base(name):
                tag = open_clip.get_pretrained_cfg(model, known)
                _check_gelu(who, name, pretrained, quick_gelu, tag)
        return pretrained, tag
    if not tag:
        # "-quickgelu" names list quick-GELU weights only; the plain name may list this tag
        tag = open_clip.get_pretrained_cfg(_base(name), pretrained)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise ValueError(
                f"{who}: pretrained {pretrained!r} is neither a tag of {name} "
                f"({', '.join(tags) or 'it has none'}) nor an existing file"
            )
    _check_gelu(who, name, pretrained, quick_gelu, tag)
    try:
        return open_clip.download_pretrained(tag), tag
    except Exception as error:
        raise _no_download(who, f"{name} / {pretrained}", tag.get("hf_hub"), error) from error


def _base(name: str) -> str:
    return name.removesuffix("-quickgelu")


def _check_gelu(who: str, name: str, weights: str, quick_gelu: bool, tag: dict[str, Any]) -> None:
    """open_clip only warns here, and the embeddings come out subtly wrong."""
    trained = bool(tag.get("quick_gelu", False))
    if trained == quick_gelu:
        return
    right = _base(name) + ("-quickgelu" if trained else "")
    if open_clip.get_model_config(right) is None:
        right = f"a copy of {name}'s JSON configuration with quick_gelu {str(trained).lower()}"
    words = {True: "quick GELU", False: "plain GELU"}
    raise ValueError(
        f"{who}: the weights {weights!r} were trained with {words[trained]}, but it computes "
        f"{words[quick_gelu]}; use {right}"
    )


def _file(who: str, path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{who}: no checkpoint file {path!r}; tags belong to open_clip's own model names, a "
            "folder or a JSON configuration takes the path of a file"
        )
    return path


def _weights_in(who: str, folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth"))
    preferred = [name for name in WEIGHT_FILES if name in found]
    if preferred or len(found) == 1:
        return str(folder / (preferred or found)[0])
    raise FileNotFoundError(
        f"{who}: expected weights in {folder} under one of {', '.join(WEIGHT_FILES)}; found "
        f"{', '.join(found) or 'none'}; for random weights give {folder / CONFIG_FILE} as the model"
    )


def _fetch(who: str, model: str, hub: str, file: str | None) -> str:
    try:
        return download_pretrained_from_hf(hub, filename=file)
    except Exception as error:
        raise _no_download(who, model, hub, error) from error


def _no_download(who: str, what: str, hub: str | None, error: Exception) -> RuntimeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    origin = f" (Hugging Face: {hub})" if hub else ""
    return RuntimeError(
        f"{who}: could not fetch {what}{origin}: {reason}. Without network: download the weights "
        f"on another machine and give the file as pretrained, or a folder as {LOCAL_DIR}PATH"
    )
