# SPDX-License-Identifier: Apache-2.0
"""A run of a method with prompts before its first step: classes, towers, teacher, data."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kdengine import assembly
from kdengine.config import RunConfig
from kdengine.data import ViewSpec, build_loader, ensure_index
from kdengine.data.dataset import DatasetIndex
from kdengine.data.split import Split, choose, few_shots, half, read_split
from kdengine.data.subset import subset
from kdengine.data.tokenize import load_tokenizer
from kdengine.models import Student
from kdengine.models.graft import grafted, prompted
from kdengine.models.prompted import PromptShape
from kdengine.ranks import Ranks
from kdengine.teachers import ClassTeacher


class Parts(NamedTuple):
    """What a run is put together from.

    Attributes:
        student: with prompts, frozen beside them.
        teachers: None in stage 1, where the student is what becomes a teacher.
        class_tokens: [N, context], the texts of the classes, as the text tower wants them.
        data: the loader, with the class of each image, and what it is about.
    """

    student: Student
    teachers: ClassTeacher | None
    class_tokens: Tensor
    data: assembly.Data


class Chosen(NamedTuple):
    """What is trained on: samples, the names of their classes, and what to tell of them."""

    images: DatasetIndex
    names: list[str]
    rows: dict[str, str]


def build(config: RunConfig, ranks: Ranks) -> Parts:
    """Everything that a method with prompts trains with.

    Raises:
        ValueError, FileNotFoundError: there is no split file, it does not belong to the data, or
            towers take no prompts.
    """
    split = open_split(config)
    chosen = open_classes(config, ranks, split)
    texts = [config.classes.template.replace("{}", name) for name in chosen.names]
    base = assembly.build_student(config)
    sizes, teachers = config.prompt, None
    image = PromptShape(tokens=sizes.image_tokens, depth=sizes.depth)
    shared: dict[str, Any] = {
        "seed": config.train.seed,
        "grad_checkpointing": config.model.grad_checkpointing,
    }
    if config.method.name == "comkd_teacher":
        tokens = load_tokenizer(base.spec.tokenizer)(texts)
        words = first_words(tokens, sizes.text_tokens, base.spec.tokenizer, config)
        text = PromptShape(tokens=sizes.text_tokens, depth=sizes.depth)
        student = prompted(base, {"image": image, "text": text}, words, **shared)
    else:
        loaded = assembly.load_teachers(config, ranks)
        if len(loaded) > 1:
            raise ValueError(
                f"distill.distill_model: method {config.method.name} learns from one teacher, "
                f"{len(loaded)} came"
            )
        (teacher,) = loaded
        tokens = load_tokenizer(teacher.spec.tokenizer)(texts)
        own = config.method.comkd
        student = grafted(
            base,
            teacher,
            image,
            num_keys=len(texts) if own.attention else 0,
            divisor=own.attention_divisor or None,
            **shared,
        )
        assembly.refuse_bf16_statistics(config.train.precision, base.spec.name, student.tower)
        teachers = ClassTeacher(
            teacher, student.spec, tokens.to(ranks.device), recompute=own.recompute_texts
        )
        bridge: Any = student.tower.clip.visual.bridge  # type: ignore[union-attr]
        if own.attention:
            bridge.attention.texts.copy_(teachers.texts)
    return Parts(student, teachers, tokens, build_data(config, ranks, student, teachers, chosen))


def open_split(config: RunConfig) -> Split:
    """The split file of the run."""
    if not config.classes.split:
        raise ValueError(
            f"classes.split: method {config.method.name} learns from images with classes, and no "
            "file says which; give --classes.split FILE.json"
        )
    return read_split(config.classes.split)


def open_classes(config: RunConfig, ranks: Ranks, split: Split) -> Chosen:
    """The images to train on; rank 0 builds what is missing of their index, the others wait."""
    if not config.data.train_data:
        raise ValueError(
            "data: expected images to train on, got none; give --data.train-data, shards or a "
            "folder with a folder of images for each class"
        )
    own = config.classes
    numbers = half(len(split.classes), own.half)
    if not numbers:
        raise ValueError(f"classes.half: {len(split.classes)} class has no {own.half} half")
    items = [item for item in split.parts["train"] if item.label in numbers]
    items = few_shots(items, own.shots, config.train.seed)
    names = [split.classes[n] for n in numbers]

    def ensure() -> tuple[DatasetIndex, int, list[str]]:
        whole = ensure_index(
            config.data.train_data,
            index_dir=config.data.index_dir,
            max_pixels=config.data.max_pixels,
            require="label",
            progress=ranks.first,
        )
        found = choose(whole, items, own.split)
        part = subset(whole, found.numbers, found.labels - numbers.start, names)
        return part, whole.num_quarantined, found.lacking

    index, num_quarantined, lacking = ranks.first_then_all(ensure, "index")
    present = set(np.unique(index.labels()).tolist())
    if empty := [split.classes[n] for n in numbers if n - numbers.start not in present]:
        raise ValueError(
            f"classes.split: no image of class {empty[0]!r} is there to train on ({len(empty)} of "
            f"{len(numbers)} classes have none); {len(lacking)} listed images are not in the data"
        )
    shots = f", {own.shots} shots" if own.shots else ""
    rows = {
        "classes": f"{len(numbers)} of {len(split.classes)} ({own.half}){shots}",
        "samples": f"{index.num_samples} of {len(split.parts['train'])} that may be trained on",
    }
    if lacking:
        why = f"{num_quarantined} of the data are quarantined" if num_quarantined else "no file"
        rows["missing"] = f"{len(lacking)} listed images, the first {lacking[0]} ({why})"
    return Chosen(index, names, rows)


def first_words(tokens: Tensor, count: int, tokenizer: str, config: RunConfig) -> Tensor:
    """The words at the places of the text prompts, equal in the texts of all classes.

    Raises:
        ValueError: the template has too few words before the name, or texts do not begin with a
            start token.
    """
    if not tokenizer.startswith("simple:"):
        raise ValueError(
            f"prompt: text prompts stand behind the start token of open_clip's own tokenizer, and "
            f"{config.model.model} has {tokenizer}"
        )
    before = load_tokenizer(tokenizer)([config.classes.template.partition("{}")[0]])[0]
    # a start token, the words, an end token, and padding
    num_words = int(before.argmax()) - 1
    if num_words < count:
        raise ValueError(
            f"classes.template: {config.classes.template!r} has {num_words} words before the name, "
            f"and {count} text prompts (--prompt.text-tokens) take the place of as many"
        )
    return tokens[0, 1 : 1 + count]


def build_data(
    config: RunConfig,
    ranks: Ranks,
    student: Student,
    teachers: ClassTeacher | None,
    chosen: Chosen,
) -> assembly.Data:
    """The training loader, whose batches hold ``image`` and ``label``, and what it is about."""
    views = {"image": ViewSpec.like(student.spec.preprocess)}
    if teachers is not None:
        views |= teachers.views()
    loader = build_loader(
        chosen.images,
        views=views,
        tokenizers={},
        batch_size=config.train.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=config.data.workers,
        seed=config.train.seed,
        device_id=ranks.local_rank if ranks.device.type == "cuda" else None,
        shuffle_buffer=config.data.shuffle_buffer,
        with_labels=True,
        flip=config.classes.flip,
    )
    about = [shard.content_digest() for shard in chosen.images.shards]
    about += [*chosen.names, config.classes.template]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    identity = {"num_samples": chosen.images.num_samples, "shards": digest}
    return assembly.Data(loader, identity, chosen.rows)
