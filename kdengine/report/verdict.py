# SPDX-License-Identifier: Apache-2.0
"""What the numbers say: the best run on each metric, and what distillation gained."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kdengine.report.markup import Html, render, tag
from kdengine.report.metrics import HEADLINES, Metric, best_runs, is_zero, signed
from kdengine.report.runs import Record, baseline_of, teachers, teachers_of


@dataclass(frozen=True)
class Pair:
    """A distilled run, its equal without teacher, and those of its teachers that are shown too."""

    distilled: Record
    plain: Record
    teachers: Sequence[Record]

    @property
    def same_seed(self) -> bool:
        """Whether both started from the same seed."""
        return self.distilled.get("train", "seed") == self.plain.get("train", "seed")

    def gain(self, metric: Metric) -> float | None:
        """What distillation added to a metric, in points (ranks: in ranks)."""
        with_, without = (run.results.get(metric.key) for run in (self.distilled, self.plain))
        return None if with_ is None or without is None else metric.gain(with_, without)

    def closed(self, metric: Metric) -> float | None:
        """Share of the distance to the teacher, the best of several, that distillation closed.

        None without a gain, or where the teacher is less than a point ahead.
        """
        gain = self.gain(metric)
        if gain is None or gain <= 0 or metric.kind != "share":
            return None
        found = [teacher.results.get(metric.key) for teacher in self.teachers]
        plain = self.plain.results[metric.key]
        distance = max((metric.gain(x, plain) for x in found if x is not None), default=0)
        return gain / distance if distance >= 1 else None


def find_pairs(runs: Sequence[Record], metrics: Sequence[Metric]) -> list[Pair]:
    """Distilled runs with an equal that was trained without teacher, both evaluated alike."""
    pairs = []
    for run in runs:
        plain = baseline_of(run, runs)
        if plain is not None:
            pair = Pair(run, plain, teachers_of(run, runs))
            if any(pair.gain(metric) is not None for metric in metrics):
                pairs.append(pair)
    return pairs


def mean_gain(pairs: Sequence[Pair], metric: Metric) -> float | None:
    """The mean over pairs of what distillation added to a metric; None where nobody knows."""
    found = [gain for pair in pairs if (gain := pair.gain(metric)) is not None]
    return statistics.fmean(found) if found else None


def contestants(runs: Sequence[Record]) -> list[Record]:
    """The runs that compete: those that only teach others are shown, but do not win."""
    aside = teachers(runs)
    return [run for run in runs if not any(run is other for other in aside)]


def verdict(runs: Sequence[Record], metrics: Sequence[Metric], pairs: Sequence[Pair]) -> Html:
    """One sentence: who wins how many metrics, and what distillation gained on the main ones."""
    rivals = contestants(runs)
    heads = headlines(metrics)
    if not any(run.results for run in runs):
        return render("None of these runs has been evaluated yet, so there is no winner.")
    evaluated = [run for run in rivals if run.results]
    if len(evaluated) < 2:
        run = (evaluated or [run for run in runs if run.results])[0]
        parts = [_value(run, metric) for metric in heads if metric.key in run.results]
        return render(
            _name(run), " reaches ", _join(parts or ["results outside the usual ones"]), "."
        )
    best_word = "best" if len(rivals) == len(runs) else "the best student"
    sentence = _winners(evaluated, metrics, best_word)
    if gained := _gains(pairs, heads):
        sentence += ["; distillation (", _who(pairs), ") ", gained]
    return render(*sentence, ".")


def headlines(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics for a sentence: top-1 and R@1 in both directions, of the first sets."""
    heads = [metric for metric in metrics if metric.headline]
    first: list[Metric] = []
    for name in HEADLINES:
        first += [metric for metric in heads if metric.key.endswith("/" + name)][:1]
    return first or list(metrics[:2])


def _winners(runs: Sequence[Record], metrics: Sequence[Metric], best_word: str) -> list[Html | str]:
    wins: Counter[str] = Counter()
    decided = 0
    for metric in metrics:
        best = best_runs(metric, runs)
        decided += bool(best)
        wins.update(run.name for run in best)
    if not decided:
        return ["These runs score alike, or share no metric"]
    order = sorted((run for run in runs if wins[run.name]), key=lambda run: -wins[run.name])
    if len(order) == 1:
        whole = decided == len(metrics)
        where = "every metric" if whole else f"{decided} of {len(metrics)} metrics"
        return [_name(order[0]), f" is {best_word} on {where}"]
    parts = [render(_name(run), f" on {wins[run.name]}") for run in order[1:]]
    first = render(_name(order[0]), f" is {best_word} on {wins[order[0].name]}")
    shared = " (ties count for each)" if sum(wins.values()) > decided else ""
    return [f"Of {decided} metrics, ", _join([first, *parts]), shared]


def _join(parts: Sequence[Html | str]) -> Html:
    """Parts as an enumeration."""
    found: list[Html | str] = []
    for n, part in enumerate(parts):
        if n:
            found.append(" and " if n == len(parts) - 1 else ", ")
        found.append(part)
    return render(*found)


def _name(run: Record) -> Html:
    return tag("b", run.name)


def _value(run: Record, metric: Metric) -> Html:
    unit = " %" if metric.kind == "share" else ""
    return render(tag("b", metric.show(run.results[metric.key]) + unit), f" {metric.inline}")


def _who(pairs: Sequence[Pair]) -> Html:
    seeds = "" if all(pair.same_seed for pair in pairs) else ", other seed"
    if len(pairs) > 1:
        return render(f"mean of {len(pairs)} pairs with the same student and budget{seeds}")
    pair = pairs[0]
    equal = f", same student and budget{seeds}"
    return render(_name(pair.distilled), " against ", _name(pair.plain), equal)


def _gains(pairs: Sequence[Pair], metrics: Sequence[Metric]) -> Html | None:
    """What distillation did to some metrics; the verb says whether it helped all of them."""
    means = [(metric, mean_gain(pairs, metric)) for metric in metrics]
    known = [(m, gain) for m, gain in means if gain is not None and m.kind == "share"]
    if not known:
        return None
    moved = [(metric, gain) for metric, gain in known if not is_zero(gain)]
    helped = all(gain > 0 for _, gain in moved)
    parts = []
    for n, (metric, gain) in enumerate(moved):
        unit = " points" if n == 0 else ""
        if helped:
            parts.append(render(tag("b", f"{gain:.1f}{unit}"), f" on {metric.inline}"))
        else:
            parts.append(render(f"{metric.inline} by ", tag("b", f"{signed(gain)} points")))
    said = [render("gains " if helped else "changes ", _join(parts))] if moved else []
    if still := [metric.inline for metric, gain in known if is_zero(gain)]:
        said.append(render("leaves ", _join(still), " unchanged"))
    return _join(said)
