# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine eval --folder`` does: evaluate a model on a folder of data sets.

A set that cannot be evaluated costs none of the others.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType

from kdengine import MAX_PIXELS
from kdengine.data.progress import counted
from kdengine.errors import is_refusal
from kdengine.evaluate import left_out
from kdengine.evaluate.command import model_words, open_model, whole
from kdengine.evaluate.evaluator import Evaluator, Kept
from kdengine.evaluate.layout import LocalSet
from kdengine.evaluate.scores import WRITING, FittingTable, Scores, flat, write_scores
from kdengine.models import TwoTower
from kdengine.ranks import on_gpu

logger = logging.getLogger(__name__)


def evaluate_suite(
    model: str,
    sets: Sequence[LocalSet],
    *,
    batch_size: int = 128,
    index_dir: str | None = None,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 4,
    out: str | Path | None = None,
    json_dir: str | Path | None = None,
    title: str | None = None,
) -> tuple[Group, bool]:
    """Evaluate a model on data sets: zero-shot, and a linear probe of those with a training part.

    A line is printed on stderr when a set is done. Both tasks use L2-normalised image embeddings,
    behind the model's projection; those of the test part are made once for both.

    Args:
        model: see ``evaluate_command``.
        sets: see ``find_sets``.
        batch_size: images in a forward pass.
        index_dir: folder of the indexes, where the shards' own cannot be written.
        max_pixels: see ``ensure_index``.
        num_threads: decoding threads.
        out: also write ``{"<set>/<metric>": value}`` to this JSON file.
        json_dir: also write a JSON file for each set and task into this folder, as soon as the set
            is done; see ``write_scores``.
        title: how the table and the JSON files call the model; as ``model`` by default.

    Returns:
        A table, and lines about what failed or was not evaluated; and whether a set failed.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see ``load_model``.
    """
    tower, spec = open_model(model)
    device = "cuda" if on_gpu() else "cpu"
    if json_dir is not None:
        Path(json_dir).mkdir(parents=True, exist_ok=True)
    runner = Evaluator(
        spec,
        [],
        batch_size=batch_size,
        index_dir=index_dir,
        max_pixels=max_pixels,
        num_threads=num_threads,
        device=device,
        progress=True,
    )
    scores: list[Scores] = []
    lines: list[str] = []
    with runner.evaluating(tower.to(device)):
        for number, one in enumerate(sets, start=1):
            start = time.perf_counter()
            own, remarks = evaluate_set(runner, tower, one)
            if json_dir is not None:
                _write(own, Path(json_dir), *model_words(title or model))
            scores.append(own)
            lines += own.remarks() + remarks
            seconds = time.perf_counter() - start
            print(f"{number} of {len(sets)}, {seconds:.0f} s: {own.line()}", file=sys.stderr)
    if out is not None:
        Path(out).write_text(json.dumps(flat(scores), indent=2, allow_nan=False) + "\n")
    parts: list[RenderableType] = [FittingTable(scores, title or model), *map(whole, lines)]
    return Group(*parts), any(one.faults for one in scores)


def _write(scores: Scores, folder: Path, model: str, pretrained: str) -> None:
    """The files of a set; a full disk is told by its scores, and costs no other set."""
    try:
        write_scores(scores, folder, model, pretrained)
    except OSError as error:
        scores.faults[WRITING] = f"its JSON in {folder}: {error.strerror}"


def evaluate_set(runner: Evaluator, tower: TwoTower, one: LocalSet) -> tuple[Scores, list[str]]:
    """The scores of a set, inside ``runner.evaluating``, and what to say about its images.

    What goes wrong is told by the scores, and not raised.
    """
    scores = Scores(one, faults=dict(one.faults))
    kept: Kept = {}
    seen: dict[str, left_out.Part] = {}
    for task, eval_set in one.tasks.items():
        try:
            indexes = runner.open(eval_set)
            for part in left_out.parts_of([eval_set], [indexes]):
                seen.setdefault(part.shards, replace(part, name=one.name))
            scores.metrics[task] = runner.run_set(tower, eval_set, indexes, kept=kept)
            scores.num_images = indexes[-1].num_samples
        except (ValueError, OSError, RuntimeError) as error:
            if not is_refusal(error):
                logger.exception("%s: this may be a bug", one.name)
            why = str(error).removeprefix(f"evaluation set {eval_set.name}: ")
            scores.faults[task] = why or type(error).__name__
    lost = [
        f"{part.name}{part.suffix}: {counted(part.index.num_quarantined, 'image')} quarantined"
        for part in seen.values()
        if part.index.num_quarantined
    ]
    return scores, lost + left_out.remarks(seen.values())
