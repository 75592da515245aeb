# SPDX-License-Identifier: Apache-2.0
"""The scores of many data sets: one table, and a JSON file a task as CLIP_benchmark writes it."""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdengine.evaluate.layout import PROBE, TASKS, ZEROSHOT, LocalSet
from kdengine.evaluate.probe import SEED
from kdengine.log import metric_text

# of fewer classes CLIP_benchmark has no acc5: five guesses are always right
NUM_TOP5 = 5
LANGUAGE = "en"
# characters; a file's name of five words may have 255 bytes
MAX_WORD = 60
_OURS = {
    ZEROSHOT: {
        "acc1": "zeroshot-top1",
        "acc5": "zeroshot-top5",
        "mean_per_class_recall": "zeroshot-mean-per-class-recall",
    },
    PROBE: {
        "lp_acc1": "probe-top1",
        "lp_acc5": "probe-top5",
        "lp_mean_per_class_recall": "probe-mean-per-class-recall",
    },
}


# of the table's columns, what a narrow terminal does without, first to last
DISPENSABLE = ("images", "acc5", "classes", "per class")
# of the table, with names of twelve characters a line
NARROWEST = 58
# among faults, of what is no task
WRITING = "writing"


@dataclass
class Scores:
    """What an evaluation found of a data set.

    Attributes:
        found: the set.
        metrics: those of ``Evaluator``, by CLIP_benchmark's names of the tasks.
        faults: why a task failed, likewise.
        num_images: how many images the test part has, the good ones.
    """

    found: LocalSet
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    num_images: int = 0

    def value(self, task: str, name: str) -> float | None:
        """A metric by CLIP_benchmark's name; None where there is none."""
        metrics = self.metrics.get(task, {})
        if name.endswith("acc5") and self.num_classes < NUM_TOP5:
            return None
        return metrics.get(_OURS[task][name])

    def headline(self, task: str) -> float | None:
        """The number that papers print of this set: see ``LocalSet.by_class``."""
        top1, _, by_class = _OURS[task]
        return self.value(task, by_class if self.found.by_class else top1)

    @property
    def num_classes(self) -> int:
        """How many classes competed."""
        names = ("zeroshot-classes", "probe-classes")
        counts = [own[name] for own in self.metrics.values() for name in names if name in own]
        return int(max(counts, default=0))

    def line(self) -> str:
        """The headlines and what failed, for a log."""
        values = {task: self.headline(task) for task in TASKS}
        told = [
            f"{TASKS[task]} {metric_text('', value)}"
            for task, value in values.items()
            if value is not None
        ]
        told += [f"{TASKS.get(task, task)} failed" for task in self.faults]
        return f"{self.found.name}: {', '.join(told) or self.found.left_out}"

    def remarks(self) -> list[str]:
        """A line for each failure, or why the set was left out."""
        name, left_out = self.found.name, self.found.left_out
        words = {**TASKS, WRITING: WRITING}
        faults = [f"{name}: {words[task]} failed: {why}" for task, why in self.faults.items()]
        return faults + ([f"{name}: {left_out}"] if left_out else [])


@dataclass(frozen=True)
class FittingTable:
    """``scores_table`` in the width of a terminal, without the columns that are too many for it.

    Elsewhere it is as wide as it needs to be. Where it still does not fit, the names of the sets
    are folded.
    """

    scores: Sequence[Scores]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number in range(len(DISPENSABLE) + 1):
            table = scores_table(self.scores, self.title, without=DISPENSABLE[:number])
            needed = Measurement.get(console, options.update(max_width=sys.maxsize), table).maximum
            if not console.is_terminal or needed <= options.max_width:
                options = options.update(max_width=needed)
                break
        else:
            options = options.update(max_width=max(options.max_width, NARROWEST))
        yield from console.render(table, options)


def scores_table(scores: Sequence[Scores], title: str, without: Collection[str] = ()) -> Table:
    """A row for each data set in percent, and their means.

    Each mean is over the sets that have the number. The columns ``without``, of ``DISPENSABLE``,
    are left out, and the caption says so.
    """
    columns = [
        ("zero-shot\nacc1", ZEROSHOT, "acc1"),
        ("acc5", ZEROSHOT, "acc5"),
        ("per\nclass", ZEROSHOT, "mean_per_class_recall"),
        ("headline", ZEROSHOT, None),
        ("probe\nacc1", PROBE, "lp_acc1"),
        ("headline", PROBE, None),
    ]
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("set", vertical="bottom", overflow="fold")
    heads = ["images", "classes", *(head for head, *_ in columns)]
    kept = [" ".join(head.split()) not in without for head in heads]
    for head in compress(heads, kept):
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    rows = [
        [one.headline(task) if name is None else one.value(task, name) for _, task, name in columns]
        for one in scores
    ]
    for one, row in zip(scores, rows, strict=True):
        counts = [f"{count:,}" if count else "-" for count in (one.num_images, one.num_classes)]
        table.add_row(Text(one.found.name), *compress([*counts, *map(_percent, row)], kept))
    table.add_section()
    known = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    means = [sum(values) / len(values) if values else None for values in known]
    table.add_row("mean", *compress(["", "", *map(_percent, means)], kept))
    table.caption = (
        "in percent; headline: per class (mean recall) for Aircraft, Caltech-101, Flowers and "
        "Pets, acc1 for the others; acc5 of five classes or more; each mean is over the sets that "
        "have the number"
        + (f"; left out, the terminal is narrow: {', '.join(without)}" if without else "")
    )
    return table


def write_scores(scores: Scores, folder: Path, model: str, pretrained: str) -> None:
    """Write a JSON file for each task that was evaluated, as ``clip_benchmark eval`` does.

    ``clip_benchmark build FOLDER`` makes its table of them. A number that is not defined is null,
    where CLIP_benchmark writes NaN, which is no JSON. Of a probe, ``C`` stands for its weight decay
    and epochs: it is solved, not trained.
    """
    for task in scores.metrics:
        metrics: dict[str, Any] = {name: scores.value(task, name) for name in _OURS[task]}
        if task == PROBE:
            metrics["C"] = scores.metrics[task]["probe-C"]
            metrics |= {"seed": SEED, "fewshot_k": -1, "normalized": True}
        record = {
            "dataset": f"wds/{scores.found.name}",
            "model": model,
            "pretrained": pretrained,
            "task": task,
            "metrics": metrics,
            "language": LANGUAGE,
        }
        words = (scores.found.name, pretrained, model, LANGUAGE, task)
        (folder / f"{'_'.join(map(_plain, words))}.json").write_text(
            json.dumps(record, allow_nan=False) + "\n"
        )


def flat(scores: Sequence[Scores]) -> dict[str, float]:
    """``{"<set>/<metric>": value}``, with the names of ``Evaluator``."""
    return {
        f"{one.found.name}/{name}": value
        for one in scores
        for metrics in one.metrics.values()
        for name, value in metrics.items()
    }


def _plain(word: str) -> str:
    """A word for the name of a file, whose length is limited."""
    plain = re.sub(r"[^\w.-]+", "_", word)
    digest = hashlib.sha256(word.encode()).hexdigest()[:8]
    return plain if len(plain) <= MAX_WORD else f"{digest}{plain[8 - MAX_WORD :]}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
