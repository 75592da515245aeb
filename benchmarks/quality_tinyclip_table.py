# SPDX-License-Identifier: Apache-2.0
"""The page of ``quality_tinyclip.py``: students beside each other, and how fast they get there."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_table import Row, short, shown_metrics
from benchmarks.trainings import machine_words, table_lines

# inherited and random
PAIRS = (("RN, manual half", "RN, random half"), ("ViT, manual half", "ViT, random half"))
# masks that learn at half the rate
SLOW = ", slower masks"
# one way to a size and another
RIVALS = (("ViT, auto 50", "ViT, manual half"), ("ViT, auto 75-50-25", "ViT, auto 25"))
RIVALS += ((f"ViT, auto 75-50-25{SLOW}", f"ViT, auto 25{SLOW}"),)
# of the steps, asked for in issue and paper alike (1.4 to 7.8 times faster)
SHARE = 1 / 1.4
Found = Mapping[tuple[str, int], Row]


def by_cell(
    rows: Sequence[Row], seeds: Sequence[int], names: Sequence[str], what: str
) -> dict[tuple, Row]:
    """The last row that has this of each variant and seed, in the order of the names."""
    found = {
        (row["variant"], row["seed"]): row
        for row in rows
        # a teacher has none
        if what in row and row["seed"] in (*seeds, None) and row["variant"] in names
    }
    return {key: found[key] for name in names for key in found if key[0] == name}


def accuracy(row: Row) -> float:
    """The mean of the shown metrics, in percent."""
    return 100 * statistics.mean(row["metrics"][name] for name in shown_metrics(row["metrics"]))


def reached(row: Row, goal: float) -> int | None:
    """The first evaluated step with this accuracy, in percent; None if it is not reached."""
    return next((step for step, mean in row["curve"] if 100 * mean >= goal), None)


def students(found: Found, speeds: Found) -> list[str]:
    """A line a variant: size, speed, metrics, time."""
    metrics = shown_metrics(list(next(iter(found.values()))["metrics"]))
    columns = ["student", "M parameters", "with token embedding", "images/s", "texts/s"]
    columns += [*map(short, metrics), "mean", "s in steps", "s a cell", "s of a core"]
    lines = []
    for variant in dict.fromkeys(name for name, _ in found):
        own = [row for (name, _), row in found.items() if name == variant]
        fast = [row for (name, _), row in speeds.items() if name == variant]
        sizes = ("both, without token embedding", "all")
        cells = [variant, *(f"{_mean(own, lambda r, w=w: r['size'][w]) / 1e6:.3f}" for w in sizes)]
        for what in ("images_per_second", "texts_per_second"):
            cells.append(f"{_mean(fast, lambda r, w=what: r[w]):.0f}" if fast else "")
        for value in (*(lambda r, m=m: 100 * r["metrics"][m] for m in metrics), accuracy):
            cells.append(_spread([value(row) for row in own]))
        cells.append(f"{_mean(own, _steps_s):.0f}")
        for what in ("time_s", "cpu_time_s"):
            known = [row[what] for row in own if what in row]
            cells.append(f"{statistics.mean(known):.0f}" if known else "")
        lines.append(cells)
    return table_lines(columns, lines)


def steps_saved(found: Found, seeds: Sequence[int]) -> list[str]:
    """A line a pair and seed: when the inherited student is where the random one ends."""
    columns = ["inherited", "seed", "random at its end", "inherited at its end"]
    columns += ["as good at step", "of", "share of the steps"]
    lines = []
    for inherited, random in PAIRS:
        for seed in seeds:
            if (inherited, seed) not in found or (random, seed) not in found:
                continue
            ours, theirs = found[inherited, seed], found[random, seed]
            goal, total = accuracy(theirs), theirs["cost"]["steps"]
            step = reached(ours, goal)
            share = "never" if step is None else f"{step / total:.2f}"
            told = ["" if step is None else str(step), str(total), share]
            lines.append([inherited, str(seed), f"{goal:.1f}", f"{accuracy(ours):.1f}", *told])
    return table_lines(columns, lines)


def gains(found: Found, seeds: Sequence[int]) -> list[str]:
    """A line a comparison: points of the mean, by seed."""
    lines = []
    for one, other in (*PAIRS, *RIVALS):
        both = [s for s in seeds if (one, s) in found and (other, s) in found]
        won = [accuracy(found[one, s]) - accuracy(found[other, s]) for s in both]
        if won:
            each = ", ".join(f"{x:+.1f}" for x in won)
            lines.append([f"{one} over {other}", f"{statistics.mean(won):+.1f}", each])
    return table_lines(["", "points of the mean", "by seed"], lines)


def page(rows: Sequence[Row], seeds: Sequence[int], names: Sequence[str]) -> str:
    """All tables, with the command that made them; variants in the order of their names."""
    found, speeds = (by_cell(rows, seeds, names, what) for what in ("metrics", "images_per_second"))
    first = next(row for row in found.values() if row["seed"] is not None)
    every = {row["curve"][0][0] for row in found.values() if len(row.get("curve", ())) > 1}
    commits = sorted({row["commit"] for row in (*found.values(), *speeds.values())})
    return "\n".join(
        [
            "# What TinyCLIP's inheritance of weights buys",
            "",
            f"`python benchmarks/quality_tinyclip.py`, seeds {', '.join(map(str, seeds))}; "
            f"{first['cost']['steps']} steps of affinity mimicking each.",
            "Percent, mean \u00b1 standard deviation over the seeds; `mean` is that of the metrics",
            "shown. `whole`: the teachers. Parameters without the token embedding, and with it.",
            "Forward passes of batches of 64, one seed, all in turn. `s in steps`: the median step",
            "times their number, of a training; `s a cell`, `s of a core`: the process, by the",
            "clock and of processors, with its start and evaluations.",
            "",
            *students(found, speeds),
            "",
            f"Steps, of which at most {SHARE:.2f} were expected; `as good`: the mean is the random",
            f"student's last one. Evaluated every {min(every, default=0)} steps, so that is "
            "rounded up.",
            "",
            *steps_saved(found, seeds),
            "",
            *gains(found, seeds),
            "",
            f"{machine_words(first)}, commit {', '.join(commits)}.",
            "",
        ]
    )


def _mean(rows: Sequence[Row], value: Callable[[Row], Any]) -> float:
    return statistics.mean(value(row) for row in rows)


def _steps_s(row: Row) -> float:
    return 1e-3 * row["cost"]["steps"] * row["cost"]["step_time_ms"]


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} \u00b1 {spread:.1f}"
