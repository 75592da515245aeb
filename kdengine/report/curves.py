# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: curves over steps, and the results of all runs side by side."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kdengine.report import likeness
from kdengine.report.marks import colour, dashes, dot
from kdengine.report.markup import Html
from kdengine.report.metrics import Metric
from kdengine.report.runs import Record, points

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
# points drawn of a curve, and points from which a moving average stands for it
MAX_POINTS, SMOOTH_FROM, WINDOWS = 300, 80, 25
MAX_LABELS, LABEL_LENGTH = 6, 17
# inches from the dot of a run to that of the next one, and of a row with two dots
STEP, ROW = 0.055, 0.24
STYLE = {
    "svg.fonttype": "none",
    # names of runs may hold dollar signs
    "text.parse_math": False,
    "svg.hashsalt": "kdengine",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}
LOSSES = {
    "task": "InfoNCE on the pairs (task)",
    "crd": "Contrastive relational distillation (crd)",
    "fd": "Feature distillation (fd)",
    "fd_sum": "Feature distillation, summed over the width (fd_sum)",
    "icl": "Interactive contrastive learning (icl)",
    "gd": "Gradient distillation (gd)",
    "afd": "Augmented feature distillation (afd)",
}


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, for every run that has it."""

    title: str
    unit: str
    lines: dict[int, tuple[list[float], list[float]]]
    from_zero: bool = False
    measured: bool = False
    smooth: bool = True
    hint: str = ""


def training_curves(runs: Sequence[Record]) -> list[Curve]:
    """Loss, its terms, likeness to the teacher, and what else is logged at every step."""
    names = dict.fromkeys(name for run in runs for record in run.steps for name in record)
    terms = [name for name in names if name.startswith("loss/")]
    wanted: list[Curve] = []

    def add(name: str, title: str, unit: str, **options: Any) -> None:
        lines = {i: run.series(name) for i, run in enumerate(runs)}
        wanted.append(Curve(title, unit, {i: v for i, v in lines.items() if v[0]}, **options))

    several = "weighted sum of each run's own terms"
    add("loss", "Training loss", "loss", hint=several if len(terms) > 1 else "")
    for name in terms:
        term = name.removeprefix("loss/")
        squared = {"fd": "mean squared error", "fd_sum": "squared error", "gd": "squared error"}
        unit = f"{squared.get(term, 'nats')}, unweighted"
        add(name, LOSSES.get(term, f"Loss term {term}"), unit)
    for one in likeness.collect(runs):
        add(one.key, one.label, one.unit, hint="each rank's batch, mean over ranks")
    add("lr", "Learning rate", "learning rate", from_zero=True, smooth=False)
    add("scale", "Scale of the logits", "exp(log scale)", smooth=False)
    add("grad_norm", "Gradient norm", "norm before clipping", from_zero=True)
    add("samples_per_second", "Throughput", "samples / s, all ranks", from_zero=True)
    add("data_wait_pct", "Waiting for data", "% of the time", from_zero=True)
    return [curve for curve in wanted if curve.lines]


def evaluation_curves(runs: Sequence[Record], metrics: Sequence[Metric]) -> list[Curve]:
    """The headline metrics over steps, where a run was evaluated more than once."""
    curves = []
    for metric in metrics:
        if not metric.headline:
            continue
        lines = {}
        for i, run in enumerate(runs):
            steps, values = points(run.evaluations, metric.key)
            if steps:
                lines[i] = (steps, [100 * value for value in values])
        if any(len(steps) > 1 for steps, _ in lines.values()):
            curves.append(Curve(metric.full, "%", lines, from_zero=True, measured=True))
    return curves


def draw_curve(curve: Curve, names: Sequence[str], key: str) -> Html:
    """One chart; ``key`` keeps its ids apart from those of other charts of the page."""
    labelled = len(curve.lines) <= MAX_LABELS
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.9))
        axes = figure.add_axes((0.115, 0.165, 0.665 if labelled else 0.86, 0.715))
        ends = []
        for i, (steps, values) in curve.lines.items():
            ends.append((_line(axes, i, steps, values, curve), i))
        _limits(axes, curve)
        axes.set_title(curve.unit, loc="left", fontsize=9, color=MUTED, pad=7)
        axes.set_xlabel("step", labelpad=3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(length=0)
        if labelled:
            _label(axes, ends, names)
        return to_svg(figure, key, curve.title)


def _line(
    axes: Any, i: int, steps: list[float], values: list[float], curve: Curve
) -> tuple[float, float]:
    x, y = _thin(np.array(steps), np.array(values))
    options = {"color": colour(i), "linestyle": dashes(i)}
    marker = dot(i) if curve.measured or len(x) == 1 else None
    if len(x) < SMOOTH_FROM or curve.measured or not curve.smooth:
        axes.plot(x, y, linewidth=1.8, marker=marker, markersize=4, **options)
        return float(x[-1]), float(y[-1])
    axes.plot(x, y, linewidth=0.8, alpha=0.28, color=colour(i))
    smooth = _smooth(y)
    axes.plot(x, smooth, linewidth=1.8, **options)
    return float(x[-1]), float(smooth[-1])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run does not make a heavy page."""
    size = -(-len(x) // MAX_POINTS)
    if size == 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average, over fewer neighbours at both ends."""
    half = max(1, len(y) // WINDOWS // 2)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    here = np.arange(len(y))
    begin, end = np.maximum(here - half, 0), np.minimum(here + half + 1, len(y))
    return (sums[end] - sums[begin]) / (end - begin)


def _limits(axes: Any, curve: Curve) -> None:
    axes.set_xlim(left=0)
    if curve.from_zero:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-12))
    else:
        low, high = axes.get_ylim()
        # a constant would fill the axis with rounding
        if high - low < 1e-3 * max(abs(high), abs(low)):
            middle, half = (low + high) / 2, 0.05 * max(abs(high), abs(low), 1e-12)
            axes.set_ylim(middle - half, middle + half)


def _label(axes: Any, ends: list[tuple[tuple[float, float], int]], names: Sequence[str]) -> None:
    """Names at the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.095
    places = sorted(((y - low) / (high - low), i) for (_, y), i in ends)
    heights: list[float] = []
    for wish, _ in places:
        heights.append(max(wish, heights[-1] + gap) if heights else wish)
    excess = heights[-1] - 1
    for n in range(len(heights) - 1, -1, -1):
        if excess > 0:
            heights[n] -= excess
            excess = heights[n - 1] + gap - heights[n] if n else 0
    for (_, i), height in zip(places, heights, strict=True):
        axes.text(
            1.02,
            height,
            shorten(names[i]),
            transform=axes.transAxes,
            va="center",
            color=darker(colour(i)),
            fontweight="bold",
        )


def darker(code: str) -> str:
    """A colour dark enough for text on white."""
    red, green, blue = (int(code[i : i + 2], 16) for i in (1, 3, 5))
    light = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    factor = min(1.0, 0.42 / light) if light > 0 else 1.0
    return "#" + "".join(f"{round(part * factor):02x}" for part in (red, green, blue))


def shorten(name: str) -> str:
    """A name that fits beside a chart; the middle goes, since ends tell runs apart."""
    if len(name) <= LABEL_LENGTH:
        return name
    half = (LABEL_LENGTH - 1) // 2
    return f"{name[:half]}\u2026{name[-half:]}"


def short(value: float) -> str:
    """A number for an axis: thousands as k, no trailing zeros."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "\u2212", 1)


def draw_results(runs: Sequence[Record], metrics: Sequence[Metric], aside: set[int]) -> Html:
    """All shares of all runs in one picture; the runs in ``aside`` are drawn hollow."""
    with matplotlib.rc_context(STYLE):
        shown = [i for i, run in enumerate(runs) if run.results]
        row_height = ROW + STEP * max(0, len(shown) - 2)
        figure = Figure(figsize=(8.6, row_height * len(metrics) + 0.62))
        height = figure.get_size_inches()[1]
        axes = figure.add_axes((0.34, 0.45 / height, 0.64, 1 - 0.55 / height))
        for row, metric in enumerate(metrics):
            values = [100 * r.results[metric.key] for r in runs if metric.key in r.results]
            axes.plot([min(values), max(values)], [row, row], color="#cbd2d9", linewidth=2.5)
            for lane, i in enumerate(shown):
                value = runs[i].results.get(metric.key)
                if value is not None:
                    hollow = i in aside
                    axes.plot(
                        100 * value,
                        # each run has its height, or equal results would hide each other
                        row + (lane - (len(shown) - 1) / 2) * STEP / row_height,
                        marker=dot(i),
                        markersize=6 if hollow else 7,
                        color=colour(i),
                        markerfacecolor="white" if hollow else colour(i),
                        markeredgewidth=1.6 if hollow else 0.8,
                        markeredgecolor=colour(i) if hollow else "white",
                        zorder=3 - 0.01 * i,
                    )
        axes.set_yticks(range(len(metrics)), [metric.full for metric in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("%", labelpad=3)
        axes.yaxis.grid(False)
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.spines["left"].set_visible(False)
        return to_svg(figure, "results", "Results of all runs, in percent")


def to_svg(figure: Figure, key: str, title: str) -> Html:
    """The figure as an element for a page: its ids unique, its text in the page's font."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r' id="([^"]*)"', rf' id="{key}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    text = re.sub(r"\n\s*", "\n", text)
    head = re.search(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head.group())
    assert box is not None
    label = title.replace("&", "and").replace('"', "'").replace("<", "").replace(">", "")
    return Html(f'<svg {box.group()} role="img" aria-label="{label}">{text[head.end() :]}')
