# SPDX-License-Identifier: Apache-2.0
"""The table of ``quality.py``: means over seeds, gains over no teacher, and what is not ahead."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.trainings import machine_words, table_lines
from kdengine.evaluate.protocols import BASE, HARMONIC, NOVEL

ALONE, MIX, CACHED = "no KD", "CLIP-KD", "CLIP-KD, cached"
# gain of ImageNet top-1 in points, of 30.55 without a teacher: CLIP-KD, Table 1 and README; GD's
# with the weight that is used here, 1e6, is of Table 9 (0.99 with 1e8)
PAPER_GAINS = {"CRD": 1.39, "FD": 3.68, "MFD": 3.54, "ICL": 2.56, "GD": 0.05, "AFD": 0.87}
PAPER_GAINS[MIX] = 4.35
Row = dict[str, Any]


class Result(NamedTuple):
    """A variant over its seeds, in percent and points.

    Attributes:
        means, spreads: of each metric; the spread is the standard deviation of a sample, 0 for one.
        gains: over the student without a teacher, by metric, one a seed that both have.
    """

    means: dict[str, float]
    spreads: dict[str, float]
    gains: dict[str, list[float]]
    time_s: float

    @property
    def mean_gain(self) -> float:
        """Mean over metrics and seeds."""
        return statistics.mean(x for values in self.gains.values() for x in values)

    @property
    def behind(self) -> dict[str, list[float]]:
        """Metrics on which some seed is not ahead."""
        return {name: values for name, values in self.gains.items() if min(values) <= 0}


def results(rows: dict[tuple, Row]) -> dict[str, Result]:
    """Means, spreads and gains of every variant that has a row."""
    found = {}
    for variant in dict.fromkeys(variant for variant, _ in rows):
        own = {seed: row for (name, seed), row in rows.items() if name == variant}
        names = next(iter(own.values()))["metrics"]
        values = {name: [100 * row["metrics"][name] for row in own.values()] for name in names}
        shared = [seed for seed in own if (ALONE, seed) in rows]
        gains = {
            name: [
                100 * (own[seed]["metrics"][name] - rows[ALONE, seed]["metrics"][name])
                for seed in shared
            ]
            for name in names
            if shared and variant != ALONE
        }
        found[variant] = Result(
            {name: statistics.mean(x) for name, x in values.items()},
            {name: statistics.stdev(x) if len(x) > 1 else 0.0 for name, x in values.items()},
            gains,
            statistics.mean(row["time_s"] for row in own.values()),
        )
    return found


def shown_metrics(names: Sequence[str]) -> list[str]:
    """The metrics that get a column; the file has all."""
    shown = ("R@1", "zeroshot-top1", "zeroshot-top5", BASE, NOVEL, HARMONIC)
    return [name for name in names if name.endswith(shown)]


def table(found: dict[str, Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: mean and spread of the metrics, and the gain over all of them."""
    metrics = shown_metrics(list(next(iter(found.values())).means))
    columns = ["loss", *map(short, metrics), "gain", "ahead", "paper's gain", "s a cell"]
    rows = []
    for variant, result in found.items():
        values = [f"{result.means[m]:.1f} \u00b1 {result.spreads[m]:.1f}" for m in metrics]
        gain, ahead = "", ""
        if result.gains:
            gain = f"{result.mean_gain:+.1f}"
            ahead = f"{len(result.gains) - len(result.behind)} of {len(result.gains)}"
        paper = f"{PAPER_GAINS[variant]:+.1f}" if variant in PAPER_GAINS else ""
        rows.append([variant, *values, gain, ahead, paper, f"{result.time_s:.0f}"])
    return columns, rows


def short(metric: str) -> str:
    """A metric's name for the head of a column."""
    found = metric.replace("image_to_text", "I2T").replace("text_to_image", "T2I")
    return found.replace("zeroshot-", "")


def misses(found: dict[str, Result], rows: dict[tuple, Row]) -> list[str]:
    """A line for each variant that is not ahead on every metric with every seed."""
    lines = []
    for variant, result in found.items():
        if result.behind:
            told = ", ".join(
                f"{short(name)} ({statistics.mean(x):+.1f}, worst {min(x):+.1f})"
                for name, x in result.behind.items()
            )
            first = next(row for (name, _), row in rows.items() if name == variant)
            changes = ", ".join(f"{k} {a:.4g} to {b:.4g}" for k, (a, b) in first["terms"].items())
            lines.append(f"* {variant}: {told}. Terms, first seed, first and last: {changes}.")
    return lines


def page(found: dict[str, Result], rows: dict[tuple, Row]) -> str:
    """The table as a page, with what is behind."""
    columns, lines = table(found)
    first = next(iter(rows.values()))
    seeds = sorted({seed for _, seed in rows})
    commits = sorted({row["commit"] for row in rows.values()})
    behind = misses(found, rows)
    return "\n".join(
        [
            f"# What each loss buys: {first['recipe']}",
            "",
            f"`python benchmarks/quality.py`, seeds {', '.join(map(str, seeds))}; "
            f"{first['cost']['steps']} steps each. Percent, mean \u00b1 standard",
            "deviation over the seeds. `gain`: over no KD with the same seed, in points, mean over",
            "all metrics of the file; `ahead`: metrics on which every seed gains. `paper's gain`:",
            "of ImageNet top-1, ViT-B/16 to ViT-T/16, on 12.9 M pairs (CLIP-KD, Table 1).",
            "",
            *table_lines(columns, lines),
            "",
            "Not ahead on every metric with every seed:",
            "",
            *(behind or ["* none"]),
            "",
            f"{machine_words(first)}, commit {', '.join(commits)}.",
            "",
        ]
    )
