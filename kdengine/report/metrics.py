# SPDX-License-Identifier: Apache-2.0
"""Metrics of evaluations: readable names, groups, which way is better, and how to print them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdengine.report.runs import Record

ARROW, MINUS, DASH = "\u2192", "\u2212", "\u2013"
DIRECTIONS = {
    "image_to_text": f"Image {ARROW} text",
    "text_to_image": f"Text {ARROW} image",
}
HEADLINES = ("zeroshot-top1", "image_to_text_R@1", "text_to_image_R@1")


@dataclass(frozen=True)
class Metric:
    """One metric of one data set.

    Attributes:
        key: its name in eval.jsonl.
        dataset: name of the evaluation set.
        group: kind of evaluation, for people.
        label: name within the group, for people.
        kind: ``share`` (0 to 1, shown in percent), ``rank`` (from 1, lower is better) or ``plain``.
        headline: one of the few that sum a set up.
    """

    key: str
    dataset: str
    group: str
    label: str
    kind: str
    headline: bool

    @property
    def full(self) -> str:
        """The label with the data set: unambiguous on its own."""
        short = ", 1 caption" if "/1caption/" in self.key else ""
        return f"{self.label} ({self.dataset}{short})" if self.dataset else self.label

    @property
    def inline(self) -> str:
        """The full name within a sentence."""
        return self.full[:1].lower() + self.full[1:]

    def better(self, value: float, other: float) -> bool:
        """Whether ``value`` is better than ``other``."""
        return value < other if self.kind == "rank" else value > other

    def show(self, value: float | None) -> str:
        """The value as text: shares in percent without the sign, all else as it is."""
        if value is None:
            return DASH
        return f"{100 * value:.1f}" if self.kind == "share" else f"{value:.1f}"

    def gain(self, value: float, other: float) -> float:
        """The difference in points for shares, in units of the metric otherwise."""
        return (value - other) * (100 if self.kind == "share" else 1)


def is_zero(difference: float) -> bool:
    """Whether a difference is none at the one digit that is printed."""
    return float(f"{abs(difference):.1f}") == 0


def signed(value: float) -> str:
    """A number with its sign; what rounds to zero has none."""
    sign = "\u00b1" if is_zero(value) else MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.1f}"


def describe(key: str) -> Metric:
    """Read a metric's name as evaluation writes it."""
    dataset, _, name = key.partition("/") if "/" in key else ("", "", key)
    headline, protocol = name in HEADLINES, name.startswith("1caption/")
    name = name.removeprefix("1caption/")
    if found := re.fullmatch(r"zeroshot-top(\d+)", name):
        label = f"Zero-shot top-{found.group(1)}"
        return Metric(key, dataset, "zero-shot classification", label, "share", headline)
    if name == "zeroshot-mean-per-class-recall":
        label = "Zero-shot mean recall of classes"
        return Metric(key, dataset, "zero-shot classification", label, "share", headline)
    found = re.fullmatch(r"(image_to_text|text_to_image)_(R@\d+|mean_rank|median_rank)", name)
    if found:
        what = found.group(2).replace("_", " ")
        group = "retrieval, " + ("1 caption per image" if protocol else "all captions")
        kind = "rank" if what.endswith("rank") else "share"
        return Metric(key, dataset, group, f"{DIRECTIONS[found.group(1)]} {what}", kind, headline)
    return Metric(key, dataset, "other metrics", name, "plain", False)


def collect(runs: Sequence[Record]) -> list[Metric]:
    """Every metric that a run has: zero-shot first, then retrieval, ranks after recalls."""
    keys = dict.fromkeys(key for run in runs for key in run.results)
    # how many classes compete is a fact about the set, in which no run can win
    metrics = [describe(key) for key in keys if not key.endswith("/zeroshot-classes")]
    sets = list(dict.fromkeys(metric.dataset for metric in metrics))
    groups = ("zero-shot", "retrieval, all", "retrieval, 1", "other")

    def order(metric: Metric) -> tuple[int, int, bool]:
        place = next(i for i, start in enumerate(groups) if metric.group.startswith(start))
        return place, sets.index(metric.dataset), metric.kind == "rank"

    return sorted(metrics, key=order)


def best_runs(metric: Metric, runs: Sequence[Record]) -> list[Record]:
    """The runs with the best value; none where there is nothing to choose."""
    having = [run for run in runs if metric.key in run.results]
    if len(having) < 2:
        return []
    best = having[0]
    for run in having[1:]:
        if metric.better(run.results[metric.key], best.results[metric.key]):
            best = run
    # a difference that prints as none counts as a tie
    top = best.results[metric.key]
    winners = [run for run in having if is_zero(metric.gain(run.results[metric.key], top))]
    return winners if len(winners) < len(having) else []
