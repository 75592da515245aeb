# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine eval`` does: load a model, evaluate it in one process, show a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kdengine import LOCAL_DIR, MAX_PIXELS
from kdengine.evaluate import left_out
from kdengine.evaluate.evaluator import Evaluator
from kdengine.evaluate.likeness import likeness_of_sets, likeness_table
from kdengine.evaluate.sets import EvalSet
from kdengine.log import metrics_table
from kdengine.models import Student, load_model
from kdengine.ranks import on_gpu

NO_TAG = "none"
"""CLIP_benchmark's word for a model that needs no tag."""


def evaluate_command(
    model: str,
    sets: Sequence[EvalSet],
    *,
    teachers: Mapping[str, str] | None = None,
    batch_size: int = 128,
    index_dir: str | None = None,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 4,
    out: str | Path | None = None,
    title: str | None = None,
) -> Group:
    """Evaluate a model on sets of images, on the GPU if there is one (see ``on_gpu``).

    Args:
        model: folder of an export, ``local-dir:PATH``, or ``ARCHITECTURE@TAG`` of open_clip, where
            a checkpoint file may stand for the tag.
        sets: see ``parse_eval_sets``.
        teachers: models, as ``model``, to compare with over the retrieval sets, by their names in
            the table.
        batch_size: images in a forward pass.
        index_dir: folder of the indexes, where the shards' own cannot be written.
        max_pixels: see ``ensure_index``.
        num_threads: decoding threads.
        out: also write ``{"<set>/<metric>": value}`` to this JSON file.
        title: of the table; the model by default.

    Returns:
        A table of all metrics and of how many images were quarantined; with teachers a second one,
        of the likeness to each; lines about what was not evaluated.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see ``load_model`` and ``Evaluator``.
    """
    tower, spec = open_model(model)
    others = {name: open_model(teacher) for name, teacher in (teachers or {}).items()}
    device = "cuda" if on_gpu() else "cpu"
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "index_dir": index_dir,
        "max_pixels": max_pixels,
        "num_threads": num_threads,
        "device": device,
    }
    evaluator = Evaluator(spec, sets, progress=True, **options)
    metrics = evaluator.run(tower.to(device))
    assert metrics is not None
    table = metrics_table(metrics, title or model)
    opened = list(left_out.parts_of(evaluator.sets, evaluator.indexes))
    left_out.add_rows(table, opened)
    parts: list[RenderableType] = [table]
    if others:
        alike = likeness_of_sets(Student(tower, spec), list(others.values()), sets, **options)
        widths = {name: other.spec.embed_dim for name, other in others.items()}
        parts.append(likeness_table(alike, sets, spec.embed_dim, widths))
        metrics |= alike
    parts += map(whole, left_out.remarks(opened))
    if out is not None:
        Path(out).write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return Group(*parts)


def whole(line: str) -> Text:
    """A line that is not wrapped: its paths are to be copied."""
    return Text(line, no_wrap=True, overflow="ignore")


def open_model(model: str) -> Student:
    """The model that a word of the command line means; see ``evaluate_command``.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: see ``load_model``.
    """
    name, tag = model_words(model)
    return load_model(name, None if tag == NO_TAG else tag)


def model_words(model: str) -> tuple[str, str]:
    """Architecture and tag of ``ARCHITECTURE@TAG``; of anything else itself and ``NO_TAG``."""
    name, at, tag = model.rpartition("@")
    if not at or Path(model).is_dir() or model.startswith(LOCAL_DIR):
        return model, NO_TAG
    return name, tag
