# SPDX-License-Identifier: Apache-2.0
"""Parts of the page about what the runs achieve: results, gains, curves, captions picked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdengine.report import curves, likeness
from kdengine.report.marks import stroke, swatch
from kdengine.report.markup import Html, note, render, tag
from kdengine.report.metrics import ARROW, DASH, Metric, best_runs, is_zero, signed
from kdengine.report.runs import Record, teachers
from kdengine.report.samples import Samples
from kdengine.report.tables import heads, number, table
from kdengine.report.verdict import Pair, contestants, mean_gain

MARKS = {True: ("right", "\u2713"), False: ("wrong", "\u2717")}


def results(runs: Sequence[Record], metrics: Sequence[Metric]) -> Html:
    """Every metric of every run, differences against the first one, the best marked."""
    if not metrics:
        return render(note("No run holds evaluation results (eval.jsonl)."), _likeness(runs))
    rivals = contestants(runs)
    first = rivals[0]
    aside = teachers(runs)

    def say(run: Record) -> str:
        step = f"step {run.evaluations[-1]['step']:,}" if run.evaluations else "not evaluated"
        return step + (", teacher" if any(run is t for t in aside) else "")

    rows: list[Html] = []
    group = ""
    for metric in metrics:
        title = f"{metric.dataset}: {metric.group}" if metric.dataset else metric.group
        if title != group:
            cell = tag("th", title, colspan=len(runs) + 1, scope="colgroup")
            rows.append(tag("tr", cell, class_="group"))
            group = title
        best = best_runs(metric, rivals)
        cells = [_result(metric, run, first, best) for run in runs]
        unit = {"share": "%", "rank": "lower is better"}.get(metric.kind)
        rows.append(tag("tr", tag("th", metric.label, tag("small", unit), scope="row"), cells))
    legend = ["Last evaluation of each run."]
    if len(runs) > 1:
        ranks = " (ranks: in ranks)" if any(m.kind == "rank" for m in metrics) else ""
        legend += [" Small numbers: difference to ", tag("b", first.name), f", in points{ranks}."]
        legend += [" ", tag("span", "Marked", class_="best key"), ": best run"]
        legend += [" (teachers stand aside)." if aside else "."]
    parts = [
        table([tag("th"), *heads(runs, say)], rows, "results"),
        tag("p", legend, class_="hint"),
    ]
    lacking = [m for m in metrics if any(m.key not in r.results for r in runs if r.results)]
    if lacking:
        parts.append(note(f"{len(lacking)} metrics were not measured for every run ({DASH})."))
    return render(_picture(runs, metrics, aside), parts, _likeness(runs))


def _likeness(runs: Sequence[Record]) -> Html:
    """How alike student and teacher were when it was last logged, in the runs that know."""
    found = likeness.collect(runs)
    last = {i: [run.series(one.key)[0][-1:] for one in found] for i, run in enumerate(runs)}
    knowing = [i for i, steps in last.items() if any(steps)]
    if not knowing:
        return render()
    say = [f"step {max(sum(steps, [0.0])):,.0f}" for steps in last.values()]
    columns = heads(runs, lambda run: say[runs.index(run)])
    rows = []
    for one in found:
        values = [runs[i].last(one.key) for i in knowing]
        cells = [tag("td", number(v, 3), class_="none" if v is None else None) for v in values]
        rows.append(tag("tr", tag("th", one.label, scope="row"), cells))
    return render(
        tag("h3", "Likeness to the teacher"),
        table([tag("th"), *(columns[i] for i in knowing)], rows, "results"),
        tag("p", likeness.EXPLANATION, class_="hint"),
    )


def _picture(runs: Sequence[Record], metrics: Sequence[Metric], aside: Sequence[Record]) -> Html:
    shares = [m for m in metrics if m.kind == "share" and any(m.key in r.results for r in runs)]
    if len(runs) < 2 or not shares:
        return render()
    hollow = {i for i, run in enumerate(runs) if any(run is t for t in aside)}
    words = [render(swatch(i), run.name) for i, run in enumerate(runs)]
    return tag(
        "figure",
        tag("figcaption", "Results at a glance", *(tag("span", w, class_="key") for w in words)),
        tag("div", curves.draw_results(runs, shares, hollow), class_="scroll wide"),
        class_="card",
    )


def _result(metric: Metric, run: Record, first: Record, best: Sequence[Record]) -> Html:
    value, reference = run.results.get(metric.key), first.results.get(metric.key)
    if value is None:
        return tag("td", DASH, class_="none")
    small = None
    if run is not first and reference is not None:
        small = tag(
            "small", signed(metric.gain(value, reference)), class_=_side(metric, value, reference)
        )
    won = any(run is other for other in best)
    return tag("td", tag("span", metric.show(value)), small, class_="best" if won else None)


def _side(metric: Metric, value: float, other: float) -> str:
    if is_zero(metric.gain(value, other)):
        return "same"
    return "up" if metric.better(value, other) else "down"


def gains(pairs: Sequence[Pair], metrics: Sequence[Metric]) -> Html:
    """What distillation gained on every metric, for every pair of equal runs."""
    shown = [m for m in metrics if any(pair.gain(m) is not None for pair in pairs)]
    mean = len(pairs) > 1
    found = [p.gain(m) for m in shown if m.kind == "share" for p in pairs]
    span = Span.of([gain for gain in found if gain is not None])
    head = [tag("th")]
    for pair in pairs:
        told = ["against ", pair.plain.name, "" if pair.same_seed else " (other seed)"]
        head.append(tag("th", pair.distilled.name, tag("small", told), scope="col"))
    if mean:
        head.append(tag("th", "Mean", tag("small", f"of {len(pairs)} pairs"), scope="col"))
    rows = []
    for metric in shown:
        cells = [_gain(pair, metric, span) for pair in pairs]
        if mean:
            cells.append(tag("td", tag("b", signed(mean_gain(pairs, metric) or 0.0))))
        rows.append(tag("tr", tag("th", metric.full, scope="row"), cells))
    hint = "Distilled minus undistilled, in points (ranks: in ranks, where less is better)."
    if any(pair.teachers for pair in pairs):
        hint += " Gap: share of the distance to the (best) teacher that was closed."
    return render(table(head, rows, "gains"), tag("p", hint, class_="hint"))


@dataclass(frozen=True)
class Span:
    """The range of gains that the bars of a table cover; zero lies within."""

    low: float
    high: float

    @classmethod
    def of(cls, gains: Sequence[float]) -> "Span":
        """The range of some gains."""
        return cls(min([0.0, *gains]), max([0.0, *gains]))

    def bar(self, gain: float, class_: str) -> Html | None:
        """A bar from zero to ``gain``."""
        width = (self.high - self.low) / 100
        if not width:
            return None
        left = (min(gain, 0.0) - self.low) / width
        inner = tag("i", style=f"left:{left:.1f}%;width:{abs(gain) / width:.1f}%", class_=class_)
        zero = tag("u", style=f"left:{-self.low / width:.1f}%")
        return tag("span", inner, zero, class_="bar")


def _gain(pair: Pair, metric: Metric, span: Span) -> Html:
    gain = pair.gain(metric)
    if gain is None:
        return tag("td", DASH, class_="none")
    plain, distilled = pair.plain.results[metric.key], pair.distilled.results[metric.key]
    side = _side(metric, distilled, plain)
    # ranks have no place on the scale of points
    bar = span.bar(gain, side) if metric.kind == "share" else tag("span", class_="bar")
    detail = f"{metric.show(plain)} {ARROW} {metric.show(distilled)}"
    closed = pair.closed(metric)
    if closed is not None:
        detail += f", gap {100 * closed:.0f} %"
    return tag("td", tag("b", signed(gain), class_=side), bar, tag("small", detail))


def charts(runs: Sequence[Record], metrics: Sequence[Metric]) -> Html:
    """Evaluation and training curves."""
    found = curves.evaluation_curves(runs, metrics) + curves.training_curves(runs)
    if not found:
        return note("No run holds logged steps (metrics.jsonl).")
    figures = []
    for n, curve in enumerate(found):
        caption = [tag("b", curve.title), tag("small", curve.hint) if curve.hint else None]
        drawing = curves.draw_curve(curve, [run.name for run in runs], f"c{n}")
        figures.append(tag("figure", tag("figcaption", caption), drawing, class_="card"))
    key = [tag("span", stroke(i), run.name, class_="key") for i, run in enumerate(runs)]
    hint = None
    if any(len(run.steps) >= curves.SMOOTH_FROM for run in runs):
        hint = tag("p", "Thin: as logged. Thick: moving average.", class_="hint")
    return render(tag("p", key, class_="keys"), hint, tag("div", figures, class_="grid"))


def pictures(runs: Sequence[Record], samples: Samples) -> Html:
    """Images with the caption each model picks."""
    notes = [note(text) for text in samples.notes]
    if not samples.found:
        return render(notes)
    cards = []
    for sample in samples.found:
        lines = [_pick(i, runs[i], pick, samples) for i, pick in sample.picks.items()]
        image = tag(
            "img",
            src=sample.source,
            alt=sample.captions[0],
            loading="lazy",
        )
        own = tag("p", tag("small", "own caption"), sample.captions[0], class_="own")
        cards.append(tag("article", image, tag("div", own, tag("ul", lines)), class_="card sample"))
    scores = []
    for i in samples.found[0].picks:
        right = sum(sample.picks[i].correct for sample in samples.found)
        scores.append(
            tag("span", swatch(i), f"{runs[i].name}: {right} of {len(cards)} right", class_="key")
        )
    hint = (
        f"{len(cards)} images spread over {samples.dataset}; each model chooses from "
        f"{samples.num_captions} captions, one an image. Rank: place of the image's own caption."
    )
    return render(
        tag("p", hint, class_="hint"),
        tag("p", scores, class_="keys"),
        notes,
        tag("div", cards, class_="grid"),
    )


def _pick(i: int, run: Record, pick: Any, samples: Samples) -> Html:
    class_, mark = MARKS[pick.correct]
    word = "correct" if pick.correct else f"wrong, own caption at rank {pick.rank}"
    return tag(
        "li",
        tag("small", swatch(i), run.name, tag("span", f"{mark} {word}", class_=f"mark {class_}")),
        pick.caption,
    )
