# SPDX-License-Identifier: Apache-2.0
"""Tables with a column for every run: what each cost, and how each was configured."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kdengine.log import duration
from kdengine.report.marks import swatch
from kdengine.report.markup import Html, note, render, tag
from kdengine.report.metrics import DASH
from kdengine.report.runs import Record, image_size, micro_batches, num_parameters, num_ranks


def heads(runs: Sequence[Record], say: Callable[[Record], Any] = lambda run: None) -> list[Html]:
    """Column heads, one a run."""
    return [
        tag("th", swatch(i), run.name, tag("small", say(run)), scope="col")
        for i, run in enumerate(runs)
    ]


def table(head: Sequence[Any], rows: Sequence[Any], class_: str) -> Html:
    """A table that scrolls sideways where the page is narrow."""
    inner = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows), class_=class_)
    return tag("div", inner, class_="scroll")


def number(value: float | None, digits: int = 0) -> str:
    """A number for a cell, its thousands apart; a dash for what is not known."""
    return DASH if value is None else f"{value:,.{digits}f}"


def median(run: Record, name: str) -> float | None:
    """The median of a logged quantity."""
    values = run.series(name)[1]
    return statistics.median(values) if values else None


def parameters(run: Record) -> str:
    """The size of the exported student, in millions."""
    count = num_parameters(run)
    return DASH if count is None else f"{count / 1e6:.2f} M"


def wall_time(run: Record) -> str:
    """Time since the start of the run when it was last logged."""
    time_s = run.last("time_s")
    return DASH if time_s is None else duration(time_s)


def cost(runs: Sequence[Record]) -> Html:
    """Time, memory and size of every run."""

    def plain(section: str, name: str) -> Callable[[Record], Any]:
        return lambda run: DASH if run.get(section, name) is None else run.get(section, name)

    lines: list[tuple[str, str, Callable[[Record], Any]]] = [
        ("Student", "", plain("model", "model")),
        ("Parameters", "exported student", parameters),
        ("Image size", "pixels", lambda run: number(image_size(run))),
        ("Method", "", plain("method", "name")),
        ("Steps", "", lambda run: number(run.steps[-1]["step"] if run.steps else None)),
        ("Samples seen", "", lambda run: number(run.last("samples_seen"))),
        ("Epochs", "", lambda run: number(run.last("epoch"), 2)),
        ("Wall time", "h:min:s", wall_time),
        (
            "Throughput",
            "samples / s, median",
            lambda run: number(median(run, "samples_per_second")),
        ),
        ("Step time", "ms, median", lambda run: number(median(run, "step_time_ms"))),
        (
            "Waiting for data",
            "% of the time, median",
            lambda r: number(median(r, "data_wait_pct"), 1),
        ),
        ("Peak memory", "MiB, first rank", lambda run: number(run.last("peak_memory_mib"))),
        ("Skipped steps", "not finite", lambda run: number(run.last("num_skipped"))),
        ("Ranks", "processes", lambda run: number(num_ranks(run))),
        ("Batch", "pairs on a rank", plain("train", "batch_size")),
        ("Micro-batches", "of that size in a step", micro_batches),
        ("Precision", "", plain("train", "precision")),
        ("ZeRO stage", "", plain("train", "zero_stage")),
    ]
    rows = [
        tag(
            "tr",
            tag("th", name, tag("small", unit or None), scope="row"),
            [tag("td", say(run)) for run in runs],
        )
        for name, unit, say in lines
    ]
    return table([tag("th"), *heads(runs)], rows, "cost")


def configurations(runs: Sequence[Record]) -> Html:
    """What differs between the runs, then the whole configuration of each."""
    flat = [_flatten(run.config) for run in runs]
    parts: list[Html] = []
    known = [values for values in flat if values]
    if len(known) > 1:
        keys = list(dict.fromkeys(key for values in known for key in values))
        differ = [k for k in keys if k != "run.name" and len({repr(v.get(k)) for v in known}) > 1]
        rows = [
            tag(
                "tr",
                tag("th", tag("code", key), scope="row"),
                [tag("td", tag("code", _show(values, key))) for values in flat],
            )
            for key in differ
        ]
        if rows:
            parts += [tag("h3", "What differs"), table([tag("th"), *heads(runs)], rows, "config")]
        else:
            parts.append(
                tag("p", "The configurations differ in nothing but the name.", class_="hint")
            )
        parts.append(tag("h3", "Whole configurations"))
    for i, (run, values) in enumerate(zip(runs, flat, strict=True)):
        if not values:
            parts.append(note(f"{run.name}: no configuration (config.toml)."))
            continue
        lines = "\n".join(f"{key} = {_show(values, key)}" for key in values)
        title = tag("summary", swatch(i), run.name, tag("small", str(run.folder)))
        parts.append(tag("details", title, tag("pre", lines)))
    return render(parts)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _show(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or DASH
    return DASH if value is None else str(value).lower() if isinstance(value, bool) else str(value)
