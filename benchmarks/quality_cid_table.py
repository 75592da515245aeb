# SPDX-License-Identifier: Apache-2.0
"""The page of ``quality_cid.py``: images by losses, what each step buys, and what was chosen."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.quality_table import Row, short, shown_metrics
from benchmarks.trainings import machine_words, table_lines

ALL, RANDOM, BALANCE = "all", "random", "balance"
TASK, INSTANCE, CLUSTER = "InfoNCE", "+ instance", "+ cluster"
DATA, LOSSES = (ALL, RANDOM, BALANCE), (TASK, INSTANCE, CLUSTER)
# what the names of these metrics have; those of retrieval have not
ZEROSHOT = "held-out/"
# rows of one training, by variant and seed
Found = Mapping[tuple[str, int], Row]


def variant(data: str, loss: str) -> str:
    """The name of a row."""
    return f"{data}, {loss}"


def parts(name: str) -> tuple[str, str]:
    """Its images and its loss."""
    data, _, loss = name.partition(", ")
    return data, loss


# (what, variant, the one it is compared with)
BY_LOSS = [
    (f"{data}: {one} over {other}", variant(data, one), variant(data, other))
    for data in DATA
    for one, other in ((INSTANCE, TASK), (CLUSTER, INSTANCE))
]
BY_DATA = [
    (f"{loss}: {one} over {other}", variant(one, loss), variant(other, loss))
    for one, other in ((BALANCE, RANDOM), (RANDOM, ALL), (BALANCE, ALL))
    for loss in LOSSES
]


def mean(row: Row) -> float:
    """The mean of all metrics, in percent."""
    return 100 * statistics.mean(row["metrics"].values())


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} \u00b1 {deviation:.1f}"


def table(found: Found) -> list[str]:
    """A line a variant."""
    first = next(iter(found.values()))
    metrics = shown_metrics(list(first["metrics"]))
    columns = ["images", "number", "passes", "loss", *map(short, metrics), "mean of all"]
    columns += ["s a cell", "s of a core", "at most"]
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        own = [row for (other, _), row in found.items() if other == name]
        data, loss = parts(name)
        line = [data, f"{own[0]['images']}", f"{own[0]['passes']:.1f}", loss]
        line += [spread([100 * row["metrics"][m] for row in own]) for m in metrics]
        line.append(spread([mean(row) for row in own]))
        used = [row["cpu_time_s"] for row in own]
        line += [f"{statistics.mean(row['time_s'] for row in own):.0f}"]
        lines.append([*line, f"{statistics.mean(used):.0f}", f"{max(used):.0f}"])
    return table_lines(columns, lines)


def gains(found: Found, pairs: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line a comparison that has seeds: points by seed, and where some seed loses."""
    lines = []
    for what, one, other in pairs:
        both = [s for name, s in found if name == one and (other, s) in found]
        if not both:
            continue
        # points of each metric, one a seed
        won = {
            name: [
                100 * (found[one, s]["metrics"][name] - found[other, s]["metrics"][name])
                for s in both
            ]
            for name in found[one, both[0]]["metrics"]
        }
        zeroshot = [points for name, points in won.items() if ZEROSHOT in name]
        retrieval = [points for name, points in won.items() if ZEROSHOT not in name]
        told = [by_seed(points) for points in (list(won.values()), retrieval, zeroshot)]
        behind = {name: min(x) for name, x in won.items() if min(x) <= 0}
        misses = ", ".join(f"{short(name)} {worst:+.1f}" for name, worst in behind.items())
        if len(behind) > len(won) // 2:
            misses = ", ".join(short(name) for name in won if name not in behind)
            misses = f"all but {misses}" if misses else "all"
        ahead = f"{len(won) - len(behind)} of {len(won)}"
        lines.append([what, *told, ahead, misses or "none"])
    columns = ["", "mean of all", "retrieval", "zero-shot", "metrics ahead with every seed"]
    return table_lines([*columns, "not ahead with some seed, its worst"], lines)


def by_seed(points: Sequence[Sequence[float]]) -> str:
    """The mean over metrics, and that of each seed."""
    each = [statistics.mean(own) for own in zip(*points, strict=True)]
    return f"{statistics.mean(each):+.1f} ({', '.join(f'{x:+.1f}' for x in each)})"


def selection(rows: Sequence[Row]) -> list[str]:
    """Sentences about the images that were chosen, and the clusters."""
    told = {row["what"]: row for row in rows}
    sets, clusters = told[BALANCE], told["clusters"]
    sizes = {int(size): count for size, count in sets["histogram"].items()}
    small = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items())[:3])
    in_sets = sum(size * count for size, count in sizes.items())
    least, median, most = clusters["rows_in_one"]
    share = sets["largest_set"] / sets["num_rows"]
    return [
        f"* Balance keeps {sets['num_kept']} of {sets['num_rows']} images at eps "
        f"{sets['eps']:.3f} (cosine {1 - sets['eps'] ** 2 / 2:.3f}): {in_sets} images lie in "
        f"{sets['num_sets']} sets of more than one ({small}), one of each stays. The largest has "
        f"{sets['largest_set']}, {share:.1%} of all; the widest is {sets['largest_diameter']:.2f} "
        f"wide, and {sets['share_of_sets_wider_than_eps']:.0%} are wider than eps.",
        f"* Of the removed {sets['removed_with_the_same_caption']:.0%} have the very caption of "
        f"the one that stays, and {sets['one_thing_of_removed']:.0%} show one thing: scenes of one "
        f"are denser, and the threshold is one for all. Two things are on "
        f"{clusters['two_things']:.0%} of all images, {told[RANDOM]['two_things']:.0%} of the "
        f"random and {sets['two_things']:.0%} of the balanced ones. In the retrieval set (scenes) "
        "all show two, in the zero-shot set (held-out) one.",
        f"* Random keeps {told[RANDOM]['num_kept']}, one choice for all seeds.",
        f"* {clusters['k']} clusters of all images, of {least} to {most} (median {median}); mean "
        f"cosine with the own centroid {1 - clusters['objective'] / 2:.3f}. Targets: the "
        f"{clusters['top']} nearest at scale {clusters['scale']:g}, all others as one.",
    ]


def page(found: Found, chosen: Sequence[Row]) -> str:
    """The tables as a page."""
    first = next(iter(found.values()))
    seeds = sorted({seed for _, seed in found})
    commits = sorted({row["commit"] for row in found.values()})
    return "\n".join(
        [
            "# What balance, the instance part and clusters of CLIP-CID buy",
            "",
            f"`python benchmarks/quality_cid.py`, seeds {', '.join(map(str, seeds))}; "
            f"{first['cost']['steps']} steps each, whatever the images,",
            "so fewer images are seen more often (`passes`). `+ instance`: the teacher's",
            "similarities beside InfoNCE; `+ cluster`: cluster discrimination and the KL beside",
            "both, against the teacher's centroids. All weights are 1, all learn from one cache.",
            "Percent, mean \u00b1 standard deviation over seeds; `mean of all`: of all metrics of",
            "the file. `s of a core`: processor time of a training with its start and evaluation,",
            "mean and largest.",
            "",
            *table(found),
            "",
            "The images and the clusters:",
            "",
            *selection(chosen),
            "",
            "What a part of the loss buys, with equal seeds and images; points, mean and by seed:",
            "",
            *gains(found, BY_LOSS),
            "",
            "What the images cost or buy, with equal seeds and losses; random is the control:",
            "",
            *gains(found, BY_DATA),
            "",
            f"{machine_words(first)}, commit {', '.join(commits)}.",
            "",
        ]
    )
