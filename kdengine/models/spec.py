# SPDX-License-Identifier: Apache-2.0
"""What has to be known about a two-tower model besides its weights; plain data, kept as JSON."""

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdengine import LOCAL_DIR

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
SIMPLE_VOCABULARY = 49408


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How an image becomes the input of a tower: a square of ``size`` pixels, normalised."""

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PreprocessSpec: size must be at least 1 pixel, got {self.size}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"PreprocessSpec: {name} needs 3 finite numbers, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"PreprocessSpec: std must be positive, got {self.std}")

    def to_open_clip(self) -> dict[str, Any]:
        """The ``preprocess_cfg`` of an ``open_clip_config.json``."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A two-tower model: where it came from, its architecture, and what it eats.

    Attributes:
        name: what the user asked for (architecture, ``local-dir:PATH``, or a JSON file).
        pretrained: tag or checkpoint file of the starting weights; None for random ones.
        model_cfg: open_clip's model configuration: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ...
        preprocess: the image side.
        tokenizer: id of the tokenizer, e.g. ``simple:77``.
        context_length: tokens of a caption.
        embed_dim: width of the embeddings.
    """

    name: str
    pretrained: str | None = None
    model_cfg: Mapping[str, Any] = field(repr=False)
    preprocess: PreprocessSpec
    tokenizer: str
    context_length: int
    embed_dim: int

    @property
    def label(self) -> str:
        """Name and tag, for people."""
        return f"{self.name} ({self.pretrained})" if self.pretrained else self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dump`` takes and ``from_dict`` reads back to an equal spec."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TowerSpec":
        """The spec that ``to_dict`` wrote, also after a trip through JSON.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ValueError(
                f"TowerSpec: fields do not match (missing {missing}, unknown {unknown}); "
                "was the file written by another version of kdengine?"
            )
        preprocess = dict(values["preprocess"])
        for name in ("mean", "std"):
            preprocess[name] = tuple(preprocess[name])
        return cls(**{**values, "preprocess": PreprocessSpec(**preprocess)})


def tokenizer_id(model_cfg: Mapping[str, Any], name: str) -> str:
    """The id of the tokenizer that a model configuration asks for.

    ``simple:77`` is open_clip's BPE with context length 77; ``hf:NAME:77`` a Hugging Face one, NAME
    being the folder itself for ``local-dir:`` models. Options of the tokenizer follow as a query:
    ``hf:timm/ViT-B-16-SigLIP:64?clean=canonicalize``.

    Raises:
        ValueError: the text tower's vocabulary is smaller than the tokenizer's.
    """
    text = model_cfg["text_cfg"]
    context = int(text.get("context_length") or 77)
    options = dict(text.get("tokenizer_kwargs") or {})
    if text.get("tokenizer_mode"):
        options["tokenizer_mode"] = text["tokenizer_mode"]
    plain = {k: str(v).lower() if isinstance(v, bool) else v for k, v in options.items()}
    query = "?" + urllib.parse.urlencode(sorted(plain.items())) if plain else ""
    if source := text.get("hf_tokenizer_name"):
        source = name.removeprefix(LOCAL_DIR) if name.startswith(LOCAL_DIR) else source
        return f"hf:{source}:{context}{query}"
    if (size := text.get("vocab_size", SIMPLE_VOCABULARY)) < SIMPLE_VOCABULARY:
        raise ValueError(
            f"model {name!r}: the text tower has a vocabulary of {size}, open_clip's tokenizer "
            f"makes ids up to {SIMPLE_VOCABULARY - 1}; set text_cfg.vocab_size to "
            f"{SIMPLE_VOCABULARY}, or name a tokenizer in text_cfg.hf_tokenizer_name"
        )
    return f"simple:{context}{query}"
