# SPDX-License-Identifier: Apache-2.0
"""Sections of the configuration that methods with prompts read; see ``kdengine.config``."""

from dataclasses import dataclass
from typing import Any, Literal

# those that learn prompts, from images with classes, and not from pairs
CLASS_METHODS = ("comkd_teacher", "comkd")


def check(owner: str, name: str, value: float, expected: str, good: bool) -> None:
    """Refuse a field's value.

    Raises:
        ValueError: it is not good.
    """
    if not good:
        raise ValueError(f"{owner}.{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What methods with prompts take of data.train_data, images with classes."""

    split: str = ""
    """JSON file of the lists train, val and test, each of [image, class number, class name]: the
    format of CoOp. Images are paths below the folder, or keys of samples of shards."""
    half: Literal["all", "base", "novel"] = "all"
    """Train on all classes, the first half of their numbers (rounded up), or the second."""
    shots: int = 0
    """Images of each class, drawn with train.seed; 0 takes all of the list train."""
    template: str = "a photo of a {}."
    """Text of a class, {} standing for its name; text prompts stand where its first words do."""
    flip: bool = True
    """Mirror half of the images."""

    def __post_init__(self) -> None:
        check("classes", "shots", self.shots, "a number >= 0", self.shots >= 0)
        if "{}" not in self.template:
            raise ValueError(
                f"classes.template: expected {{}} where the class name goes, got {self.template!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Learnable prompts in frozen towers, of methods with prompts."""

    image_tokens: int = 4
    """Prompts in a layer of the image tower."""
    text_tokens: int = 4
    """Prompts in a layer of the text tower, which a student takes over from its teacher."""
    depth: int = 9
    """Layers of a tower that have prompts, the first ones."""

    def __post_init__(self) -> None:
        for name in ("image_tokens", "text_tokens", "depth"):
            value = getattr(self, name)
            check("prompt", name, value, "a number >= 1", value >= 1)


@dataclass(frozen=True, kw_only=True)
class ComKD:
    """Losses and bridge of ComKD-CLIP's student; PromptKD's with align 0 and no attention."""

    kl: float = 1.0
    """KL of teacher's and student's logits over the texts of the classes."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """Over classes: summed, so that an image weighs the same whatever their number N; or divided by
    N, as PromptKD does with its kl of 1000, and logged as kl_mean."""
    temperature: float = 1.0
    """Divides both logits; the KL is multiplied by its square."""
    align: float = 1.0
    """IFAlign: means and variances of the batch's embeddings against the teacher's, in L1."""
    attention: bool = True
    """EduAttention: the student's embedding looks at the teacher's texts of all classes."""
    attention_divisor: float = 0.0
    """Divides the logits of that attention; 0 is the root of the width."""
    recompute_texts: bool = False
    """Encode the texts of all classes in each step, as PromptKD's released trainer does, and not
    once before the first: to compare."""

    def __post_init__(self) -> None:
        for name in ("kl", "align", "attention_divisor"):
            value = getattr(self, name)
            check("method.comkd", name, value, "a number >= 0", value >= 0)
        hot = self.temperature
        check("method.comkd", "temperature", hot, "a temperature > 0", hot > 0)


def refuse_with_prompts(config: Any) -> None:
    """Refuse what means nothing, or something else, to a method with prompts.

    Raises:
        ValueError: a field of the run's configuration is such.
    """
    fields = {
        "data.dataset_type": ("webdataset", config.data.dataset_type == "webdataset"),
        "data.keep": ("none", config.data.keep is None),
        "train.num_chunks": ("none", config.train.num_chunks is None),
        "train.regather": ("False", not config.train.regather),
        "distill.cache": ("none, as crops are drawn anew", config.distill.cache is None),
        "prune.target": ("0", not config.prune.target),
        "train.accum_freq": ("1", config.train.accum_freq == 1),
        "train.zero_stage": ("at most 2", config.train.zero_stage < 3),
        "train.torchcompile": ("False", not config.train.torchcompile),
    }
    for name, (expected, good) in fields.items():
        if not good:
            section, _, own = name.partition(".")
            value = getattr(getattr(config, section), own)
            raise ValueError(
                f"{name}: expected {expected} with method {config.method.name}, got {value!r}"
            )
