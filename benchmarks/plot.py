# SPDX-License-Identifier: Apache-2.0
"""Draw time, peak memory and share of the floor against the batch, from measured rows.

    python benchmarks/plot.py benchmarks/results/similarity_cpu.jsonl --out FILE.svg [--width 512]

A row of panels for each objective that was measured at two batches or more; a line a backend.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

Row = dict[str, Any]
# ours stand out; peers in order of their first row
OURS = {"triton": "#c1272d", "torch": "#e8862e", "cuda": "#7b1fa2"}
PEER_COLOURS = ("#222222", "#2166ac", "#4d9221", "#67a9cf", "#8c6d31", "#999999", "#5e4fa2")
PEER_COLOURS += ("#1b9e77", "#a6761d")
METRICS: dict[str, Callable[[Row], float | None]] = {
    "forward + backward, ms": lambda row: row["forward_backward"]["median_ms"],
    "peak above inputs, MiB": lambda row: row.get("peak_mib"),
    "share of the floor": lambda row: row.get("share_minimum"),
}


def read(paths: Sequence[Path], width: int, scale: float, dtype: str | None) -> list[Row]:
    """The timed rows of one width, scale and dtype; a later row replaces an earlier one."""
    found: dict[tuple, Row] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            fits = row.get("width") == width and row.get("teacher_width", width) == width
            fits = fits and row.get("scale", scale) == scale and "forward_backward" in row
            fits = fits and "objective" in row and not row["backend"].endswith(" graph")
            if fits and dtype in (None, row["dtype"]):
                found[row["objective"], row["backend"], row["rows"]] = row
    kinds = {row["dtype"] for row in found.values()}
    if len(kinds) > 1:
        sys.exit(f"plot: rows of one dtype are needed; {sorted(kinds)} came; give --dtype")
    return list(found.values())


def colours(backends: Sequence[str]) -> dict[str, str]:
    """A colour a backend, the same in all panels."""
    peers = [name for name in backends if name not in OURS]
    return OURS | {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(peers)}


def draw_panel(axes: Axes, rows: list[Row], metric: str, palette: dict[str, str]) -> None:
    """One metric of one objective."""
    value_of = METRICS[metric]
    batches = sorted({row["rows"] for row in rows})
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = sorted((r for r in rows if r["backend"] == backend), key=lambda row: row["rows"])
        points = [(row["rows"], value_of(row)) for row in own if value_of(row) is not None]
        if points:
            is_ours = backend in OURS
            axes.plot(
                *zip(*points, strict=True),
                marker="o" if is_ours else "s",
                markersize=5 if is_ours else 4,
                linewidth=2.4 if is_ours else 1.4,
                color=palette[backend],
                label=backend,
                zorder=3 if is_ours else 2,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches], rotation=30, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    if metric.startswith("share"):
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # within two decades, powers of ten alone would be too few
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def draw(rows: list[Row], out: Path) -> None:
    """Write the figure; the ending of ``out`` says which format."""
    objectives = [
        name
        for name in dict.fromkeys(row["objective"] for row in rows)
        if len({row["rows"] for row in rows if row["objective"] == name}) > 1
    ]
    if not objectives:
        sys.exit("plot: rows of at least two batches of one objective are needed; none came")
    metrics = [m for m, value_of in METRICS.items() if any(value_of(row) for row in rows)]
    palette = colours(list(dict.fromkeys(row["backend"] for row in rows)))
    size = (4.2 * len(metrics), 3.1 * len(objectives) + 0.9)
    figure, grid = plt.subplots(
        len(objectives), len(metrics), figsize=size, squeeze=False, layout="constrained"
    )
    for line, objective in zip(grid, objectives, strict=True):
        own = [row for row in rows if row["objective"] == objective]
        for axes, metric in zip(line, metrics, strict=True):
            draw_panel(axes, own, metric, palette)
            axes.set_title(f"{objective}: {metric}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("batch")
    labelled = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    first = rows[0]
    figure.suptitle(f"{first['device']}, width {first['width']}, {first['dtype']}", fontsize=11)
    columns = min(5, len(labelled))
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, frameon=False
    )
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="results of bench_similarity.py")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scale", type=float, default=14.3)
    parser.add_argument("--dtype", help="where the files have several")
    options = parser.parse_args(arguments)
    draw(read(options.files, options.width, options.scale, options.dtype), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
