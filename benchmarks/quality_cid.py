# SPDX-License-Identifier: Apache-2.0
"""What CLIP-CID's semantic balance and its instance and cluster parts buy, over seeds.

    python benchmarks/quality_cid.py --seeds 3
    python benchmarks/quality_cid.py --seeds 10-12 --data all --k 256 -- --train.steps 100

A student of the demo learns from all images, from any 56.3 % of them, and from the 56.3 % that
balance keeps, with InfoNCE, with the instance part beside it, and with the cluster part (cluster
discrimination and the KL) beside both. All nine have the same student, number of steps and batch,
and learn from the same cache of one teacher's embeddings, so fewer images are seen more often.

Cache, choice of images and clusters are made once, by the commands. The clusters are those of all
images, so that two rows of one loss differ in their images alone, and the random images are one
choice, whatever the seed. The student's images are compared with the teacher's centroids, through a
linear head.

Clusters and what the student is compared with were chosen on seed 10; seeds 0-2 are for the report.
Words behind ``--`` go to every training. Finished cells are not run again, see ``cells.py``.
"""

import argparse
import functools
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import cells, common, quality, quality_cid_table, race, trainings  # noqa: E402
from benchmarks.cells import Cell  # noqa: E402
from benchmarks.quality_cid_table import ALL, BALANCE, CLUSTER, INSTANCE, RANDOM, TASK  # noqa: E402
from benchmarks.quality_table import Row  # noqa: E402
from kdengine import arguments  # noqa: E402
from kdengine.cluster.embeddings import open_embeddings, read_parts  # noqa: E402
from kdengine.cluster.folder import MANIFEST, read_manifest  # noqa: E402
from kdengine.demo.shards import render_data  # noqa: E402

RECIPE = Path(__file__).parent / "recipes" / "quality_cid.toml"
RESULTS = Path(__file__).parent / "results" / "quality_cid"
# the paper's share
RETENTION = 0.563
# rules of balance; all images need none
RULES = {ALL: None, RANDOM: "random", BALANCE: "sets"}
# weights of the instance part and of both parts about clusters
LOSSES = {TASK: (0.0, 0.0), INSTANCE: (1.0, 0.0), CLUSTER: (1.0, 1.0)}
# clusters, nearest ones that are stored of an image, and the scale of the teacher's softmax
K, TOP, SCALE = 256, 64, 20.0


def clusters_folder(options: argparse.Namespace) -> Path:
    """Its name tells how it was made, for settings too."""
    return options.out / f"clusters-{options.k}-{options.top}-{options.scale:g}"


def keep_folder(options: argparse.Namespace, data: str) -> Path:
    return options.out / f"balance-{RULES[data]}-{RETENTION}"


def make(options: argparse.Namespace) -> None:
    """Clusters and both choices of images, unless they are there."""
    lines = {clusters_folder(options): ["cluster", "--k", str(options.k), "--top",
             str(options.top), "--scale", repr(options.scale)]}  # fmt: skip
    for data, rule in RULES.items():
        if rule:
            words = ["balance", "--rule", rule, "--retention", repr(RETENTION)]
            lines[keep_folder(options, data)] = words
    for folder, (command, *words) in lines.items():
        if (folder / MANIFEST).exists():
            continue
        line = ["-m", "kdengine.cli", command, str(options.out / "cache"), str(folder), *words]
        if reason := trainings.run_here(line, folder.with_suffix(".log"), options.out):
            raise common.Refusal(f"quality_cid: {folder.name} could not be made: {reason}")
        print(f"{folder.name}: made", flush=True)


def scenes(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """How many things each image shows, and its full caption, in the order of the cache's rows."""
    told = []
    for part in open_embeddings(options.out / "cache").parts:
        shard = Path(part.folder).name.rpartition("-")[0]
        with tarfile.open(options.out / "data" / shard) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    told.append(json.load(file))
    things = np.array([len(each["scene"]["things"]) for each in told])
    return things, np.array([each["caption"] for each in told])


def selections(options: argparse.Namespace) -> list[Row]:
    """What the clusters and the choices of images are, a row each."""
    embeddings, (things, captions) = open_embeddings(options.out / "cache"), scenes(options)
    folders = {"clusters": clusters_folder(options)}
    folders |= {data: keep_folder(options, data) for data, rule in RULES.items() if rule}
    rows = []
    for what, folder in folders.items():
        told = read_manifest(folder)
        # digests are of the cache's files, what was asked is in the name
        for name in ("embeddings", "digest", "asked", "format", "objectives"):
            told.pop(name, None)
        row: Row = {"benchmark": "selection", "what": what, "folder": folder.name, **told}
        keep = np.ones(len(things), bool)
        if what == "clusters":
            sizes = np.quantile(np.load(folder / "sizes.npy"), [0, 0.5, 1])
            row["rows_in_one"] = [int(size) for size in sizes]
        else:
            keep = read_parts(folder, embeddings, "keep")
        row["two_things"] = round(float((things[keep] == 2).mean()), 4)
        if what == BALANCE:
            gone, stands = ~keep, read_parts(folder, embeddings, "stands")
            row["one_thing_of_removed"] = round(float((things[gone] == 1).mean()), 4)
            same = captions[gone] == captions[stands[gone]]
            row["removed_with_the_same_caption"] = round(float(same.mean()), 4)
        rows.append(row)
    return rows


def words_of(data: str, loss: str, options: argparse.Namespace) -> list[str]:
    """The words of a variant, behind those of the recipe."""
    instance, cluster = LOSSES[loss]
    words = ["--method.name", "clip_cid", "--method.clip-cid.instance", repr(instance)]
    for name in ("cluster", "cluster-kl"):
        words += [f"--method.clip-cid.{name}", repr(cluster)]
    words += ["--method.clip-cid.clusters", str(clusters_folder(options))] if cluster else []
    words += ["--data.keep", str(keep_folder(options, data))] if RULES[data] else []
    return words


def plan(options: argparse.Namespace, teacher: Path) -> list[Cell]:
    """All cells, seed by seed, so that what is there early is a whole table of fewer seeds."""
    shared = ["--recipe", str(RECIPE), "--distill.cache", str(options.out / "cache")]
    planned = []
    for seed in options.seeds:
        for data in options.data:
            for loss in options.losses:
                words = [*shared, *words_of(data, loss, options), *options.words]
                words += ["--train.seed", str(seed)]
                settings = cells.digest(words, teacher, views=quality.VIEWS)
                name = quality_cid_table.variant(data, loss)
                planned.append(Cell(RECIPE.stem, name, seed, words, settings))
    return planned


def more(cell: Cell, options: argparse.Namespace) -> Row:
    """What a row has beside that of every table of trainings: images, and passes over them."""
    config = arguments.parse(cell.words)
    data, _ = quality_cid_table.parts(cell.variant)
    folder = clusters_folder(options) if RULES[data] is None else keep_folder(options, data)
    num_images = read_manifest(folder)["num_kept"]
    passes = config.train.steps * config.train.batch_size / num_images
    return {"images": num_images, "passes": round(passes, 2)}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cells.add_options(parser)
    parser.add_argument("--data", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--k", type=int, default=K, help="clusters")
    parser.add_argument("--top", type=int, default=TOP, help="nearest clusters of an image")
    parser.add_argument("--scale", type=float, default=SCALE, help="of the teacher's softmax")
    parser.add_argument("--out", type=Path, help="folder of data, teacher, cache and runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="path without ending")
    options = cells.parse(parser, words)
    options.recipe = str(RECIPE)
    # data, teacher and cache are those of the demo's other table
    options.out = (options.out or common.REPOSITORY / "runs" / "quality_demo").resolve()
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if words is None else words)
    os.environ["KDENGINE_DEMO"] = str(options.out)
    render_data(options.out / "data", 0)
    teacher = cells.train_once(options.out / "teacher", ["--recipe", "demo_teacher"], options.out)
    planned = plan(options, teacher)
    path = options.results.with_suffix(".jsonl")
    if cells.unfinished(path, planned):
        quality.make_cache(options, teacher)
    make(options)
    num_failed = cells.train_all(
        path, planned, options.out, functools.partial(more, options=options)
    )
    chosen, known = selections(options), trainings.load_rows(path)
    for row in chosen:
        if row not in known:
            common.append_json(path, row)
    rows = cells.finished(path, planned)
    if rows:
        text = quality_cid_table.page(rows, chosen)
        options.results.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
    return race.WRONG if num_failed else 0


if __name__ == "__main__":
    sys.exit(common.command(main))
