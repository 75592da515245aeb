# SPDX-License-Identifier: Apache-2.0
"""Cells of a table of trainings: one run each, told by a digest of its settings, made once.

A finished cell is a row of the results file, told by recipe, variant, seed and a digest of all
settings of student and teacher; when the command is given again, finished cells are not run again,
and failed ones are.
"""

import argparse
import hashlib
import json
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common, trainings
from benchmarks.quality_table import Row, short, shown_metrics
from kdengine import LOCAL_DIR, arguments
from kdengine.config import load_recipe, to_dict
from kdengine.demo import run
from kdengine.log import METRICS, read
from kdengine.stages import stage_lines

# what a run may differ in without being another experiment
PLACES = ("data.index_dir", "data.workers", "eval.batch_size", "distill.distill_model")
PLACES += ("distill.cache",)


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
        variant = re.sub(r"[^a-zA-Z0-9]+", "_", self.variant).strip("_").lower()
        return f"{self.recipe}-{variant}-{self.seed}"

    def folders(self, out: Path) -> list[Path]:
        """Of its runs: one, or one a stage."""
        lines = stage_lines([*self.words, *self._place(out)])
        names = [line[len(line) - line[::-1].index("--run.name")] for line in lines]
        return [out / "cells" / name for name in names]

    def _place(self, out: Path) -> list[str]:
        return ["--run.logs", str(out / "cells"), "--run.name", self.name]

    def train(self, out: Path) -> Row:
        """Run it; its row, with the reason in place of metrics if it failed."""
        folder = out / "cells" / self.name
        shutil.rmtree(folder, ignore_errors=True)
        words = ["kdengine/train.py", *self.words, *self._place(out)]
        start, cpu_before = time.perf_counter(), cpu_time_s()
        reason = trainings.run_here(words, folder.with_suffix(".log"), out)
        row: Row = {"benchmark": "quality", **self.identity}
        row["time_s"] = round(time.perf_counter() - start, 1)
        # tells what a busy machine hides
        row["cpu_time_s"] = round(cpu_time_s() - cpu_before, 1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if reason:
            return {**row, "reason": reason, **common.machine(device)}
        folders = self.folders(out)
        for each in folders:
            # weights and moments of every cell would fill the disk; the export stays
            shutil.rmtree(each / "checkpoints", ignore_errors=True)
        last = folders[-1]
        row |= {"metrics": run.last_evaluation(last), "cost": trainings.cost(*folders)}
        return {**row, "terms": terms(last), **common.machine(device)}


def train_once(folder: Path, words: Sequence[str], out: Path) -> Path:
    """A run that others build on, trained with these words unless its export is there.

    Raises:
        Refusal: it could not be trained.
    """
    if not (folder / "export").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{folder.name}: {' '.join(words[:2])}", flush=True)
        line = ["kdengine/train.py", *words, "--run.logs", str(folder.parent)]
        line += ["--run.name", folder.name, "--run.no-tensorboard"]
        start = time.perf_counter()
        if reason := trainings.run_here(line, folder.with_suffix(".log"), out):
            raise common.Refusal(f"{folder.name} could not be trained: {reason}")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def digest(words: Sequence[str], teacher: Path, **more: Any) -> str:
    """A digest of all settings of student and teacher that are not places on this machine.

    Args:
        words: of the training; of one in stages each is told.
        teacher: its run.
        more: what else makes it another experiment.
    """
    told: list[Row] = [plain(to_dict(arguments.parse(line))) for line in stage_lines(words)]
    for values in told:
        # a cell's seed stands beside its digest
        del values["train.seed"]
    told += [plain(to_dict(load_recipe(str(teacher / "config.toml")))), more]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def plain(values: Row) -> Row:
    """A configuration without names of the run and places.

    A model's file stands for its name, a folder's name for its path.
    """

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
    elif model.startswith(LOCAL_DIR):
        # of an export the run's name, too
        parts = Path(model).parts
        found["model.model"] = "/".join(parts[-2:] if parts[-1] == "export" else parts[-1:])
    for name in ("data.train_data", "eval.retrieval", "eval.zeroshot", "classes.split"):
        # folders go: what is left of a path is its last part
        texts = [found[name]] if isinstance(found[name], str) else found[name]
        found[name] = [re.sub(r"[^=;:]*/", "", text) for text in texts]
    # folders whose names tell how they were made
    for name in ("data.keep", "method.clip_cid.clusters"):
        if name in found:
            found[name] = Path(found[name]).name
    return found


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


def unfinished(path: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those that have no row with metrics."""
    done = finished(path, cells)
    return [cell for cell in cells if (cell.variant, cell.seed) not in done]


def train_all(
    path: Path, cells: Sequence[Cell], out: Path, more: Callable[[Cell], Row] | None = None
) -> int:
    """Run those that are not finished and append their rows to the file; how many failed.

    Args:
        path: of the rows.
        cells: in the order in which they run.
        out: folder of data, teacher and runs.
        more: what else the row of a finished cell is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    left = unfinished(path, cells)
    print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished; results in {path}",
          flush=True)  # fmt: skip
    num_failed = 0
    for number, cell in enumerate(left, start=1):
        print(f"[{number}/{len(left)}] {cell.variant}, seed {cell.seed}", flush=True)
        row = cell.train(out)
        if "reason" in row:
            num_failed += 1
            print(f"  failed: {row['reason']}", flush=True)
        else:
            row |= more(cell) if more else {}
            shown = shown_metrics(list(row["metrics"]))
            told = ", ".join(f"{short(name)} {100 * row['metrics'][name]:.1f}" for name in shown)
            print(f"  {row['time_s']:.0f} s, {row['cpu_time_s']:.0f} of a core: {told}", flush=True)
        common.append_json(path, row)
    return num_failed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every table."""
    parser.add_argument("--seeds", type=seed_range, default=[0, 1, 2], help="3, or 10-12, or 1,5")


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options, and in ``words`` what stands behind ``--``, for every training."""
    own, rest = list(words), []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.words = rest
    return options


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
