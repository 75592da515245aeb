# SPDX-License-Identifier: Apache-2.0
"""What each loss of CLIP-KD buys: one student, trained with each, over several seeds.

    python benchmarks/quality.py --seeds 3 [--recipe benchmarks/recipes/quality_demo.toml]
    python benchmarks/quality.py --seeds 10-12 --variants FD GD -- --train.steps 200

All variants have the same student, data, order and number of steps; each is a run of
``kdengine/train.py`` in a process of its own, and its numbers are those of the run's last
evaluation. The teacher is trained once, with the recipe of ``--teacher``. Words behind ``--`` go to
every student's training.

The weights are the paper's (see ``variants``). What was chosen (student, steps, which of the
paper's weights of GD) was chosen on seeds 10-12; seeds 0-2 are for the report.

A finished cell is a row of the results file, told by recipe, variant, seed and a digest of all
settings of student and teacher; when the command is given again, finished cells are not run again,
and failed ones are.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, quality_table, race, trainings  # noqa: E402
from benchmarks.quality_table import ALONE, CACHED, MIX, Row, short, shown_metrics  # noqa: E402
from kdengine import arguments  # noqa: E402
from kdengine.config import RunConfig, load_recipe, to_dict  # noqa: E402
from kdengine.demo import run  # noqa: E402
from kdengine.demo.shards import render_data  # noqa: E402
from kdengine.log import METRICS, read  # noqa: E402
from kdengine.models import build_student  # noqa: E402
from kdengine.models.masking import install_mask  # noqa: E402

RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parent / "results"
TEACHERS = dict.fromkeys(("quality_demo", "quality_demo_vit"), "demo_teacher")
TEACHERS["quality_flickr8k"] = "clip_flickr8k"
# batch and width at which the paper found its weights
PAPER_BATCH, PAPER_WIDTH = 1024, 512
# the smallest of the paper's 1e6 to 1e9, with which the demo's student learns (see gd_weight)
PAPER_GD = 1e6
# of the mean over the width, as in the paper's tables
FD = 2000.0
# of Table 10's ratios the one whose numbers are those of MFD in Table 1
MASK_RATIO = 0.25
# what a run may differ in without being another experiment
PLACES = ("data.index_dir", "data.workers", "eval.batch_size", "distill.distill_model")
PLACES += ("distill.cache",)
# of the cache: crops of every image; the precision is the command's own choice
VIEWS = 4


class Cell(NamedTuple):
    """One training: which, with which words, and the digest of its settings."""

    recipe: str
    variant: str
    seed: int
    words: list[str]
    settings: str

    @property
    def identity(self) -> Row:
        """What tells its row from others; no commit."""
        return {"recipe": self.recipe, "variant": self.variant, "seed": self.seed,
                "settings": self.settings}  # fmt: skip

    @property
    def name(self) -> str:
        """Of its folder."""
        variant = re.sub(r"[^a-zA-Z]+", "_", self.variant).lower()
        return f"{self.recipe}-{variant}-{self.seed}"


def gd_weight(batch: int, width: int) -> float:
    """One of the paper's weights of GD, for another batch and width.

    GD is ``1/(N E) sum_k ||g_k - g_k^teacher||^2`` with ``g = scale/N G Y``: G's rows and Y's rows
    keep their size when N and E change, so each of the N summands falls as 1/N^2, and the loss as
    1/(N^2 E). The weight that keeps the weighted loss is ``w (N / 1024)^2 (E / 512)``.

    The paper swept w = 1e6, 1e7, 1e8, 1e9 and took 1e8, with a release that divides cosines by the
    scale, where GD is nearly nothing. As the formula says, with 1e8 the gradient of GD is 40 times
    the task's at the start of the demo, and the student makes all embeddings equal and stays there
    (seed 10; with 1e7 it was there at step 50, when it was stopped). 1e6, the smallest of the
    sweep, was taken because the student learned with it on that seed.
    """
    return PAPER_GD * (batch / PAPER_BATCH) ** 2 * (width / PAPER_WIDTH)


def variants(batch: int, width: int, cache: Path) -> dict[str, list[str]]:
    """The words of each variant: the paper's weights, each loss beside the task loss.

    FD's 2000 is of the mean over the width. (Summed over it with 2000 / 512, which is the same at
    the paper's width and a quarter at the demo's, zero-shot fell behind no KD on seed 10.) AFD's
    weight is not in the paper: 1. The cached mix learns from ``VIEWS`` stored crops of each image
    in place of new ones.
    """

    def kd(mask_ratio: float = 0.0, **weights: float) -> list[str]:
        none = dict.fromkeys(("crd", "fd", "icl", "gd", "afd"), 0.0)
        words = ["--method.name", "clip_kd", "--method.clip-kd.fd-reduction", "mean"]
        for name, weight in {"task": 1.0, **none, **weights}.items():
            words += [f"--method.clip-kd.{name}", repr(weight)]
        return [*words, "--method.clip-kd.mask-ratio", repr(mask_ratio)]

    return {
        ALONE: ["--method.name", "clip"],
        "CRD": kd(crd=1.0),
        "FD": kd(fd=FD),
        "MFD": kd(fd=FD, mask_ratio=MASK_RATIO),
        "ICL": kd(icl=1.0),
        "GD": kd(gd=gd_weight(batch, width)),
        "AFD": kd(afd=1.0),
        MIX: kd(crd=1.0, fd=FD, icl=1.0),
        CACHED: [*kd(crd=1.0, fd=FD, icl=1.0), "--distill.cache", str(cache)],
    }


def digest(config: RunConfig, teacher: Path) -> str:
    """A digest of all settings of student and teacher that are not places on this machine."""
    told = [plain(to_dict(config)), plain(to_dict(load_recipe(str(teacher / "config.toml"))))]
    # a cell's seed stands beside its digest
    del told[0]["train.seed"]
    told[0]["views"] = VIEWS if config.distill.cache else 0
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def plain(values: Row) -> Row:
    """A configuration without names of the run and places; a model's file stands for its name."""

    def leaves(table: Row, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                yield from leaves(value, f"{name}.")
            elif not name.startswith("run.") and name not in PLACES:
                yield name, value

    found = dict(leaves(values, ""))
    model = found["model.model"]
    if model.endswith(".json"):
        found["model.model"] = json.loads((common.REPOSITORY / model).read_text(encoding="utf-8"))
    for name in ("data.train_data", "eval.retrieval", "eval.zeroshot"):
        # folders go: what is left of a path is its last part
        texts = [found[name]] if isinstance(found[name], str) else found[name]
        found[name] = [re.sub(r"[^=;:]*/", "", text) for text in texts]
    return found


def train_teacher(options: argparse.Namespace) -> Path:
    """The teacher's run, trained unless its export is there."""
    folder = options.out / "teacher"
    if not (folder / "export").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"the teacher: {options.teacher}", flush=True)
        words = ["kdengine/train.py", "--recipe", options.teacher, "--run.logs", str(options.out)]
        words += ["--run.name", "teacher", "--run.no-tensorboard"]
        start = time.perf_counter()
        reason = trainings.run_here(words, options.out / "teacher.log", options.out)
        if reason:
            raise common.Refusal(f"quality: the teacher could not be trained: {reason}")
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def why_no_mask(config: RunConfig) -> str | None:
    """Why the student cannot be trained with MFD; None if it can."""
    student = build_student(config.model.model, config.model.pretrained, seed=0)
    try:
        install_mask(student.tower.clip.visual)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None


def plan(options: argparse.Namespace, teacher: Path) -> list[Cell]:
    """All cells, seed by seed, so that what is there early is a whole table of fewer seeds."""
    export = teacher / "export"
    width = json.loads((export / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
    shared = ["--recipe", options.recipe, *options.words]
    shared += ["--distill.distill-model", f"local-dir:{export}"]
    config = arguments.parse(shared)
    known = variants(config.train.batch_size, width, options.out / "cache")
    if unknown := set(options.variants or ()) - set(known):
        raise common.Refusal(
            f"--variants: {sorted(unknown)} came; there are {', '.join(map(repr, known))}"
        )
    names = options.variants or list(known)
    if "MFD" in names and (reason := why_no_mask(config)):
        print(f"MFD is left out: {reason}", flush=True)
        names = [name for name in names if name != "MFD"]
    cells = []
    for seed in options.seeds:
        for name in names:
            words = [*shared, *known[name], "--train.seed", str(seed)]
            settings = digest(arguments.parse(words), teacher)
            cells.append(Cell(Path(options.recipe).stem, name, seed, words, settings))
    return cells


def make_cache(options: argparse.Namespace, teacher: Path) -> None:
    """Fill the cache of the teacher's embeddings; one that is whole is told so by the command."""
    folder, start = options.out / "cache", time.perf_counter()
    words = ["-m", "kdengine.cli", "cache", str(folder), "--views", str(VIEWS)]
    words += ["--recipe", options.recipe, *options.words]
    words += ["--distill.distill-model", f"local-dir:{teacher / 'export'}"]
    reason = trainings.run_here(words, folder.with_suffix(".log"), options.out)
    if reason:
        raise common.Refusal(f"quality: the teacher's embeddings could not be stored: {reason}")
    print(f"the cache: {time.perf_counter() - start:.0f} s", flush=True)


def train(cell: Cell, out: Path) -> Row:
    """Run one cell; its row, with the reason in place of metrics if it failed."""
    folder = out / "cells" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    words = ["kdengine/train.py", *cell.words]
    words += ["--run.logs", str(folder.parent), "--run.name", cell.name]
    start, cpu_before = time.perf_counter(), cpu_time_s()
    reason = trainings.run_here(words, folder.with_suffix(".log"), out)
    row: Row = {"benchmark": "quality", **cell.identity}
    row["time_s"] = round(time.perf_counter() - start, 1)
    # tells what a busy machine hides
    row["cpu_time_s"] = round(cpu_time_s() - cpu_before, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason:
        return {**row, "reason": reason, **common.machine(device)}
    # weights and moments of every cell would fill the disk; the export stays
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    row |= {"metrics": run.last_evaluation(folder), "cost": trainings.cost(folder)}
    return {**row, "terms": terms(folder), **common.machine(device)}


def cpu_time_s() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def terms(folder: Path) -> dict[str, list[float]]:
    """First and last logged value of the loss and its terms, unweighted."""
    steps = read(folder / METRICS)
    names = [name for name in steps[0] if name.startswith("loss")]
    return {name: [steps[0][name], steps[-1][name]] for name in names}


def finished(path: Path, cells: Sequence[Cell]) -> dict[tuple, Row]:
    """Rows with metrics of these cells, by variant and seed, in the order of the cells."""
    names = ("recipe", "variant", "seed", "settings")
    rows = [row for row in trainings.load_rows(path) if "metrics" in row]
    known = {tuple(row[name] for name in names): row for row in rows}
    keys = {(cell.variant, cell.seed): tuple(cell.identity.values()) for cell in cells}
    return {cell: known[key] for cell, key in keys.items() if key in known}


def seed_range(text: str) -> list[int]:
    """Seeds: ``3`` is 0 to 2, ``10-12`` those, ``1,5`` these."""
    if re.fullmatch(r"[1-9]\d*", text):
        return list(range(int(text)))
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = map(int, match.groups())
        if first <= last:
            return list(range(first, last + 1))
    if re.fullmatch(r"\d+(,\d+)+", text):
        return [int(word) for word in text.split(",")]
    raise argparse.ArgumentTypeError(
        f"expected a number of seeds (3), a range (10-12) or a list (1,5); {text!r} came"
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    name = "quality_flickr8k" if on_gpu else "quality_demo"
    parser.add_argument("--recipe", default=str(RECIPES / f"{name}.toml"), help="of the students")
    parser.add_argument("--teacher", help="recipe of the teacher, where the students' has no known")
    parser.add_argument("--seeds", type=seed_range, default=[0, 1, 2], help="3, or 10-12, or 1,5")
    parser.add_argument("--variants", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--out", type=Path, help="folder of data, teacher and runs")
    parser.add_argument("--results", type=Path, help="path of the results, without ending")
    own, rest = list(words), []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.words = rest
    stem = Path(options.recipe).stem
    options.teacher = options.teacher or TEACHERS.get(stem)
    if options.teacher is None:
        parser.error(f"--teacher: {stem} has no known teacher; name the recipe that trains one")
    if options.recipe.endswith(".toml"):
        # trainings run in the repository
        options.recipe = str(Path(options.recipe).resolve())
    # recipes of the demo share its data, teacher and cache
    folder = "quality_demo" if stem.startswith("quality_demo") else stem
    options.out = (options.out or common.REPOSITORY / "runs" / folder).resolve()
    options.results = options.results or RESULTS / stem
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if words is None else words)
    # recipes of the demo find their data by it
    os.environ["KDENGINE_DEMO"] = str(options.out)
    if str(options.out / "data") in load_recipe(options.recipe).data.train_data:
        render_data(options.out / "data", 0)
    teacher = train_teacher(options)
    cells = plan(options, teacher)
    path = options.results.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = finished(path, cells)
    left = [cell for cell in cells if (cell.variant, cell.seed) not in done]
    print(f"{len(cells)} cells, {len(done)} of them finished; results in {path}", flush=True)
    if any(cell.variant == CACHED for cell in left):
        make_cache(options, teacher)
    num_failed = 0
    for number, cell in enumerate(left, start=1):
        print(f"[{number}/{len(left)}] {cell.variant}, seed {cell.seed}", flush=True)
        row = train(cell, options.out)
        common.append_json(path, row)
        if "reason" in row:
            num_failed += 1
            print(f"  failed: {row['reason']}", flush=True)
            continue
        shown = shown_metrics(list(row["metrics"]))
        told = ", ".join(f"{short(name)} {100 * row['metrics'][name]:.1f}" for name in shown)
        print(f"  {row['time_s']:.0f} s, {row['cpu_time_s']:.0f} of a core: {told}", flush=True)
    rows = finished(path, cells)
    if rows:
        found = quality_table.results(rows)
        text = quality_table.page(found, rows)
        options.results.with_suffix(".md").write_text(text, encoding="utf-8")
        common.show(f"{cells[0].recipe}, percent", *quality_table.table(found))
        print("\n".join(quality_table.misses(found, rows)))
    return race.WRONG if num_failed else 0


if __name__ == "__main__":
    sys.exit(common.command(main))
