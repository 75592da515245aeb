# SPDX-License-Identifier: Apache-2.0
"""What distillation buys: the demo over several seeds.

    python benchmarks/demo_seeds.py

Runs the whole demo (data, teacher, student without and with it) once a seed, prints every metric of
every seed, and writes ``results/demo_seeds.jsonl`` (one line a seed) and ``results/demo_seeds.md``.
Fails unless the distilled student is ahead on every metric with every seed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.common import REPOSITORY, append_json, machine, show  # noqa: E402
from benchmarks.trainings import cost, machine_words, table_lines  # noqa: E402
from kdengine.demo import run  # noqa: E402

COSTS = ["seed", "run", "steps", "training, s", "step, ms", "peak memory, MiB"]


def measure(seed: int, out: Path) -> dict[str, Any]:
    """Run the demo with one seed; a row with the metrics and the cost of each of its runs."""
    start = time.perf_counter()
    code = run.main(out, seed)
    runs = {name: out / name for name in run.RUNS}
    return {
        "benchmark": "demo_seeds",
        "seed": seed,
        "ahead": code == 0,
        "time_s": round(time.perf_counter() - start, 1),
        "metrics": {name: run.last_evaluation(folder) for name, folder in runs.items()},
        "cost": {name: cost(folder) for name, folder in runs.items()},
        **machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def gains(row: dict[str, Any]) -> dict[str, float]:
    """Gain of the distilled student in points, by metric."""
    alone, distilled = row["metrics"]["student"], row["metrics"]["student_distilled"]
    return {name: 100 * (distilled[name] - value) for name, value in alone.items()}


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: per seed teacher / alone / distilled, then the gains."""
    columns = ["metric", *(f"seed {row['seed']}" for row in rows), "mean gain", "smallest"]
    cells = []
    for metric in rows[0]["metrics"]["student"]:
        won = [gains(row)[metric] for row in rows]
        values = [
            " / ".join(f"{100 * row['metrics'][name][metric]:.1f}" for name in run.RUNS)
            for row in rows
        ]
        cells.append([metric, *values, f"{statistics.mean(won):+.1f}", f"{min(won):+.1f}"])
    return columns, cells


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as a page, with the command that made it."""
    columns, cells = table(rows)
    costs = [
        [str(row["seed"]), name, *(f"{values[key]:g}" for key in values)]
        for row in rows
        for name, values in row["cost"].items()
    ]
    lines = [
        "# The demo over several seeds",
        "",
        "`python benchmarks/demo_seeds.py`. Percent; a cell is teacher / student alone / student",
        "distilled. Both students have the same weights at the start, data, order and number of",
        "steps. `1caption` keeps one caption a picture; `held-out` are combinations of colour and",
        "shape that training never shows, to be told from all 80.",
        "",
        *table_lines(columns, cells),
        "",
        *table_lines(COSTS, costs),
    ]
    first = rows[0]
    times = ", ".join(f"{row['time_s']:.0f}" for row in rows)
    lines += [
        "",
        f"Whole demo: {times} s. {machine_words(first)}, commit {first['commit']}. "
        "Distilled ahead on every metric: "
        + ", ".join(f"seed {row['seed']} {'yes' if row['ahead'] else 'no'}" for row in rows)
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "demo_seeds")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "demo_seeds"
    )
    options = parser.parse_args()
    lines = options.results.with_suffix(".jsonl")
    lines.unlink(missing_ok=True)
    rows = []
    for seed in options.seeds:
        rows.append(measure(seed, options.out / f"seed-{seed}"))
        append_json(str(lines), rows[-1])
    options.results.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    show("teacher / student alone / student distilled, percent", *table(rows))
    return 0 if all(row["ahead"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
