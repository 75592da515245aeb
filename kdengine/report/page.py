# SPDX-License-Identifier: Apache-2.0
"""The page as a whole."""

import os
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import kdengine
from kdengine.report import sections, tables
from kdengine.report.markup import Html, note, render, tag
from kdengine.report.metrics import collect
from kdengine.report.runs import Record, read_runs
from kdengine.report.samples import choose_captions
from kdengine.report.verdict import find_pairs, verdict


def write_report(runs: Sequence[Path], out: Path, *, title: str = "Training runs compared") -> Path:
    """Write one self-contained HTML page that compares runs.

    The page holds a verdict, the results of the last evaluations, curves, cost, images with the
    caption each exported student picks, and the configurations. What a run lacks is noted on the
    page. A run that teaches another one of the page is shown, but takes no part in being best.

    Args:
        runs: folders that training wrote; the first one that is no teacher is what the others
            are compared with.
        out: the file to write; its folder is made.
        title: heading of the page.

    Returns:
        ``out``.

    Raises:
        ValueError: there is no run, one is given twice, or a folder is not that of a run.
        FileNotFoundError: a folder does not exist.
        OSError: the page cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"report: {out} is a folder; expected the name of a file (--out)")
    records = read_runs([Path(folder) for folder in runs])
    text = make_page(records, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return out


def make_page(runs: Sequence[Record], title: str) -> Html:
    """The page of runs that were read."""
    metrics = collect(runs)
    pairs = find_pairs(runs, metrics)
    parts = [("results", "Results", sections.results(runs, metrics))]
    if pairs:
        parts.append(("gains", "What distillation gained", sections.gains(pairs, metrics)))
    parts += [
        ("curves", "Curves", sections.charts(runs, metrics)),
        ("cost", "Cost", tables.cost(runs)),
        ("samples", "Captions picked", sections.pictures(runs, choose_captions(runs))),
        ("configuration", "Configuration", tables.configurations(runs)),
    ]
    plural = "run" if len(runs) == 1 else "runs"
    made = (
        f"{len(runs)} {plural}, {time.strftime('%Y-%m-%d %H:%M')}, kdengine {kdengine.__version__}"
    )
    links = [tag("a", name, href=f"#{key}") for key, name, _ in parts]
    # what several runs lack is said once
    lacks: dict[str, list[str]] = {}
    for run in runs:
        for text in run.notes:
            lacks.setdefault(text, []).append(run.name)
    remarks = [note(tag("b", ", ".join(names)), ": ", text) for text, names in lacks.items()]
    body = [
        tag(
            "header",
            tag("h1", title),
            tag("p", made, class_="hint"),
            tag("p", verdict(runs, metrics, pairs), class_="verdict"),
            remarks,
            tag("nav", links),
        ),
        tag("main", [tag("section", tag("h2", name), part, id=key) for key, name, part in parts]),
    ]
    css = files("kdengine.report").joinpath("style.css").read_text(encoding="utf-8")
    head = [
        tag("meta", charset="utf-8"),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(css)),
    ]
    return render(
        Html("<!doctype html>\n"), tag("html", tag("head", head), tag("body", body), lang="en")
    )
