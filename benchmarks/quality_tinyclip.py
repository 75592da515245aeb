# SPDX-License-Identifier: Apache-2.0
"""What TinyCLIP's inheritance of weights buys on rendered scenes, over seeds.

    python benchmarks/quality_tinyclip.py [--seeds 3] [--variants 'ViT, auto 50' ...]

Affinity mimicking in every training, with the same data, order and number of steps. The students,
each with its teacher:

* half of the demo's ResNet, with random weights and cut by hand (``kdengine inherit``, the released
  rule, batch norms measured anew);
* half of a ViT: random weights, cut by hand, cut by masks that are learned on the way;
* a quarter of the ViT by masks: in one run, and in three stages of a third of the steps each; both
  with the masks' learning rate halved, too.

Steps, learning rates and the masks' settings (``recipes/quality_tinyclip*.toml``) were chosen on
seeds 10 and 11; seeds 0-2 are for the report. Teachers are trained once. Finished cells are not run
again, see ``cells.py``; two commands with other variants can run at once. Then the speed of the
students of one seed is measured, in turn.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import cells, common, quality_tinyclip_table, race, trainings  # noqa: E402
from benchmarks.cells import Cell  # noqa: E402
from benchmarks.quality_table import Row, shown_metrics  # noqa: E402
from benchmarks.quality_tinyclip_table import SLOW  # noqa: E402
from kdengine import LOCAL_DIR  # noqa: E402
from kdengine.demo import run  # noqa: E402
from kdengine.demo.shards import render_data  # noqa: E402
from kdengine.log import EVALUATIONS, read  # noqa: E402
from kdengine.models import load_model  # noqa: E402
from kdengine.models.sizes import parameter_counts  # noqa: E402

RECIPES = Path("benchmarks/recipes")
RESULTS = Path(__file__).parent / "results" / "quality_tinyclip"
BASE, STAGES = "quality_tinyclip", "quality_tinyclip_75_50_25"
# teachers: folder of the run, recipe, configuration of its half
RESNET, VIT = "teacher", "teacher_vit"
TEACHERS = {RESNET: "demo_teacher", VIT: str(RECIPES / "quality_tinyclip_teacher.toml")}
HALVES = {RESNET: RECIPES / "RN-Pico-64-half.json", VIT: RECIPES / "ViT-Micro-64-half.json"}
WHOLE = {"RN, whole": RESNET, "ViT, whole": VIT}
# steps between evaluations, where one student is to reach what another ends with
EVERY = 24
SPEED_BATCH = 64


class Variant(NamedTuple):
    """A student: its teacher's folder, its recipe, and further words."""

    teacher: str
    recipe: str
    words: list[str]


def variants(out: Path) -> dict[str, Variant]:
    """The students by their names in the table."""

    def half(teacher: str, model: str) -> Variant:
        return Variant(teacher, BASE, ["--model.model", model, "--eval.val-frequency", str(EVERY)])

    whole = ["--model.model", f"{LOCAL_DIR}{out / VIT / 'export'}"]
    found = {}
    for name, teacher in (("RN", RESNET), ("ViT", VIT)):
        found[f"{name}, random half"] = half(teacher, str(HALVES[teacher]))
        found[f"{name}, manual half"] = half(teacher, f"{LOCAL_DIR}{cut(out, teacher)}")
    found["ViT, auto 50"] = Variant(VIT, f"{BASE}_auto_50", whole)
    for name, words in (("", []), (SLOW, ["--prune.mask-lr", "0.3"])):
        found[f"ViT, auto 25{name}"] = Variant(VIT, f"{BASE}_auto_25", [*whole, *words])
        found[f"ViT, auto 75-50-25{name}"] = Variant(VIT, STAGES, words)
    return found


def cut(out: Path, teacher: str) -> Path:
    """The folder of the student cut by hand."""
    return out / f"{teacher}-half"


def inherit(out: Path, teacher: str) -> None:
    """Cut the student by hand, unless it is there.

    Raises:
        Refusal: the command failed.
    """
    folder = cut(out, teacher)
    if folder.is_dir():
        return
    words = ["-m", "kdengine.cli", "inherit", str(folder)]
    words += ["--teacher", str(out / teacher / "export"), "--student", str(HALVES[teacher])]
    if teacher == RESNET:
        words += ["--calibration", str(out / "data" / "scenes-train-{000..001}.tar")]
    if reason := trainings.run_here(words, out / f"{folder.name}.log", out):
        raise common.Refusal(f"no student could be cut out of {teacher}: {reason}")


def plan(options: argparse.Namespace) -> list[Cell]:
    """All cells, seed by seed, so that what is there early is a whole table of fewer seeds."""
    known, planned = variants(options.out), []
    if unknown := set(options.variants or ()) - set(known):
        raise common.Refusal(
            f"--variants: {sorted(unknown)} came; there are {', '.join(map(repr, known))}"
        )
    for seed in options.seeds:
        for name in options.variants or known:
            teacher, recipe, words = known[name]
            words = ["--recipe", str(RECIPES / f"{recipe}.toml"), *words]
            words += ["--distill.distill-model", f"{LOCAL_DIR}{options.out / teacher / 'export'}"]
            words += ["--train.seed", str(seed)]
            half = json.loads(HALVES[teacher].read_text(encoding="utf-8"))
            settings = cells.digest(words, options.out / teacher, half=half)
            planned.append(Cell(BASE, name, seed, words, settings))
    return planned


def teacher_row(name: str, folder: Path) -> Row:
    """What a student's row has, of a teacher; no seed."""
    row: Row = {"benchmark": "quality", "recipe": BASE, "variant": name, "seed": None}
    row |= {"metrics": run.last_evaluation(folder), "cost": trainings.cost(folder)}
    return {**row, **about(folder), **common.machine(torch.device("cpu"))}


def about(folder: Path) -> Row:
    """A model's size, and how the metrics of its run rose."""
    curve = read(folder / EVALUATIONS)
    shown = shown_metrics(list(curve[-1]))
    rising = [[one["step"], statistics.mean(one[name] for name in shown)] for one in curve]
    return {"size": parameter_counts(load_model(folder / "export").tower.clip), "curve": rising}


def speeds(models: Mapping[str, Path], seed: int, seconds: float = 20.0) -> list[Row]:
    """Forward passes of the towers of these runs' exports, in turn; a row each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {}
    for name, folder in models.items():
        model = load_model(folder / "export")
        side = model.spec.preprocess.size
        clip = model.tower.clip.to(device).eval()
        image = torch.randn(SPEED_BATCH, 3, side, side, device=device)
        tokens = torch.randint(1, 40_000, (SPEED_BATCH, model.spec.context_length), device=device)
        runs[name, "images"] = lambda clip=clip, x=image: clip.encode_image(x)
        runs[name, "texts"] = lambda clip=clip, x=tokens: clip.encode_text(x)
    with torch.inference_mode():
        times = common.time_interleaved(runs, device, seconds)
    rows = []
    for name in models:
        row: Row = {"benchmark": "quality_speed", "variant": name, "seed": seed}
        for what in ("images", "texts"):
            spread = times[name, what]
            row[f"{what}_per_second"] = 1e3 * SPEED_BATCH / spread.median_ms
            row[f"{what}_ms"] = spread._asdict()
        rows.append({**row, **common.machine(device)})
    return rows


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cells.add_options(parser)
    parser.add_argument("--variants", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--out", type=Path, default=Path("runs/quality_demo"),
                        help="folder of data, teachers and runs")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="path without ending")
    options = parser.parse_args(words)
    options.out = options.out.resolve()
    options.results = options.results.resolve()
    return options


def main(words: Sequence[str] | None = None) -> int:
    # recipes name each other, and models, from here
    os.chdir(common.REPOSITORY)
    options = parse(words)
    os.environ["KDENGINE_DEMO"] = str(options.out)
    render_data(options.out / "data", 0)
    for folder, recipe in TEACHERS.items():
        cells.train_once(options.out / folder, ["--recipe", recipe], options.out)
        inherit(options.out, folder)
    planned = plan(options)
    path = options.results.with_suffix(".jsonl")
    num_failed = cells.train_all(
        path, planned, options.out, lambda cell: about(cell.folders(options.out)[-1])
    )
    first = [cell for cell in planned if cell.seed == options.seeds[0]]
    if not options.variants and not cells.unfinished(path, first):
        teachers = {name: options.out / folder for name, folder in WHOLE.items()}
        models = {**teachers, **{cell.variant: cell.folders(options.out)[-1] for cell in first}}
        new = [teacher_row(name, folder) for name, folder in teachers.items()]
        for row in new + speeds(models, options.seeds[0]):
            common.append_json(path, row)
        rows = trainings.load_rows(path)
        text = quality_tinyclip_table.page(rows, options.seeds, list(models))
        options.results.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
    return race.WRONG if num_failed else 0


if __name__ == "__main__":
    sys.exit(common.command(main))
