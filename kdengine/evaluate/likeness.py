# SPDX-License-Identifier: Apache-2.0
"""How alike a student and its teachers embed whole retrieval sets."""

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from rich.table import Table

from kdengine.data.index import MAX_PIXELS, DatasetIndex, ensure_index
from kdengine.data.progress import Progress
from kdengine.data.tokenize import load_tokenizer
from kdengine.evaluate.embed import embed_images, embed_texts, image_loader
from kdengine.evaluate.sets import EvalSet
from kdengine.methods.likeness import MODALITIES, key, likeness
from kdengine.models import Features, Student


def likeness_of_sets(
    student: Student,
    teachers: Sequence[Student],
    sets: Sequence[EvalSet],
    *,
    batch_size: int = 128,
    index_dir: str | None = None,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 4,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compare embeddings over the pairs of each retrieval set: all images, their first captions.

    Each model sees images and captions as it wants them, and is on ``device`` while it embeds.

    Args:
        student: what is compared.
        teachers: what it is compared with.
        sets: those that are no retrieval sets are passed over.
        batch_size: images, also captions, in a forward pass.
        index_dir: folder of the indexes, where the shards' own cannot be written.
        max_pixels: see ``ensure_index``.
        num_threads: decoding threads.
        device: where to embed.

    Returns:
        ``{"<set>/cosine/image": value, ...}``; see ``kdengine.methods.likeness``. What is not
        defined is left out: of a set of less than four pairs, of a model for which all are one.

    Memory: the embeddings of one set by all models.

    Raises:
        ValueError, RuntimeError: see ``ensure_index`` and ``embed_images``.
    """
    found: dict[str, float] = {}
    for one in sets:
        if one.kind != "retrieval":
            continue
        with one.named_in_errors():
            index = ensure_index(one.shards, index_dir=index_dir, max_pixels=max_pixels)
            embedded = []
            for number, model in enumerate((student, *teachers)):
                who = f"{one.name}, {f'teacher {number}' if number else 'student'}"
                model.tower.to(device)
                embedded.append(embed_pairs(model, index, who, batch_size, num_threads, device))
                model.tower.to("cpu")
            own, *others = embedded
            values = likeness(own, others, [own[:2]] * len(others))
            found |= {f"{one.name}/{name}": float(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def embed_pairs(
    model: Student,
    index: DatasetIndex,
    name: str,
    batch_size: int,
    num_threads: int,
    device: torch.device | str,
) -> Features:
    """Unit embeddings of all images and first captions of a set, in the order of its samples."""
    tower, spec = model
    num = index.num_samples
    firsts = [captions[0] for captions in index.texts(np.arange(num))]
    loader = image_loader(spec, index, batch_size, num_threads, device)
    try:
        with Progress(sys.stderr.isatty()) as bars:
            advance = bars.begin(f"compare {name}", "batches", 2 * -(-num // batch_size))

            def after_batch() -> bool:
                advance(1, 1)
                return False

            image = embed_images(tower, loader, num, device=device, should_stop=after_batch)
            text = embed_texts(
                tower,
                firsts,
                load_tokenizer(spec.tokenizer),
                batch_size=batch_size,
                device=device,
                should_stop=after_batch,
            )
    finally:
        loader.close()
    return Features(image, text, tower.log_scale.detach().exp())


def likeness_table(
    values: Mapping[str, float], sets: Sequence[EvalSet], width: int, teachers: Mapping[str, int]
) -> Table:
    """A row for each set, teacher and modality.

    Args:
        values: from ``likeness_of_sets``.
        sets: of the evaluation.
        width: of the student's embeddings.
        teachers: widths of the teachers, by their names.
    """
    table = Table(title="student and teacher", title_justify="left", caption_justify="left")
    for column in ("set", "teacher", "of"):
        table.add_column(column)
    for column in ("cosine", "CKA"):
        table.add_column(column, justify="right")
    for one in (one for one in sets if one.kind == "retrieval"):
        for number, (teacher, other) in enumerate(teachers.items()):
            for modality in MODALITIES:
                cells = [
                    values.get(f"{one.name}/{key(measure, modality, number)}")
                    for measure in ("cosine", "cka")
                ]
                told = ["-" if value is None else f"{value:.3f}" for value in cells]
                if width != other:
                    told[0] = f"- ({width} and {other} wide)"
                table.add_row(one.name, teacher, f"{modality}s", *told)
    table.caption = "all images, first captions; CKA: debiased, linear"
    if set(teachers.values()) != {width}:
        table.caption += (
            "; no cosine of unequal widths: the heads of a training, which map one to the other, "
            "are not exported"
        )
    return table
