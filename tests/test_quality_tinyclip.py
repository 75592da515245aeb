# SPDX-License-Identifier: Apache-2.0
"""What inheritance buys: its trainings are comparable, its page says what its rows say."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells, quality_tinyclip, quality_tinyclip_table, trainings
from kdengine import arguments
from kdengine.config import load_recipe, to_toml
from kdengine.models import build_student
from kdengine.models.sizes import parameter_counts
from kdengine.pruning import lacking, original_parameters
from kdengine.stages import stage_lines


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with teachers that have a configuration only."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("KDENGINE_DEMO", str(tmp_path))
    for folder, recipe in quality_tinyclip.TEACHERS.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.toml").write_text(to_toml(load_recipe(recipe)))
    return tmp_path


def test_trainings_differ_in_the_student_alone(out: Path) -> None:
    planned = quality_tinyclip.plan(quality_tinyclip.parse(["--out", str(out), "--seeds", "2"]))
    assert len({cell.name for cell in planned}) == len(planned) == 18
    assert len({cell.settings for cell in planned}) == 9
    total, gone = {}, {}
    for cell in planned:
        stages = [arguments.parse(line) for line in stage_lines(cell.words)]
        total[cell.variant] = sum(config.train.steps or 0 for config in stages)
        gone[cell.variant] = [config.prune.target for config in stages]
        first = stages[0]
        for config in stages:
            assert config.method.name == "tinyclip" and config.method == first.method
            assert (config.data, config.train.batch_size) == (first.data, 64)
            assert config.train.seed == cell.seed and config.optim.lr == first.optim.lr
            assert config.distill.distill_model == first.distill.distill_model
    assert len(set(total.values())) == 1
    assert gone["ViT, auto 75-50-25"] == [0.25, 0.5, 0.75]
    assert gone["ViT, auto 25"] == [0.75] and gone["ViT, auto 50"] == [0.5]
    # a stage begins where the last one ended
    chain = [cell for cell in planned if cell.variant == "ViT, auto 75-50-25"][0]
    folders = chain.folders(out)
    assert [folder.name[-3:] for folder in folders] == ["_75", "_50", "_25"]
    line = stage_lines([*chain.words, "--run.logs", str(out / "cells"), "--run.name", chain.name])
    assert f"local-dir:{folders[0] / 'export'}" in line[1]


def test_half_is_half() -> None:
    vit = build_student(str(quality_tinyclip.RECIPES / "ViT-Micro-64.json"), seed=0)
    half = build_student(str(quality_tinyclip.HALVES[quality_tinyclip.VIT]), seed=0)
    share = original_parameters(half.spec) / original_parameters(vit.spec)
    assert lacking(half.spec) == 0 and share == pytest.approx(0.5, abs=0.005)
    what = "both, without token embedding"
    resnet = build_student("RN-Pico-64", seed=0)
    half = build_student(str(quality_tinyclip.HALVES[quality_tinyclip.RESNET]), seed=0)
    share = parameter_counts(half.tower.clip)[what] / parameter_counts(resnet.tower.clip)[what]
    # widths are whole heads of its attention pooling
    assert 0.5 < share < 0.58


def row_of(variant: str, seed: int, value: float, curve: list[list[float]]) -> dict[str, Any]:
    size = {"both, without token embedding": 600_000, "all": 3_750_000}
    cost = {"steps": 60, "step_time_ms": 200.0}
    where = {"commit": "abc", "device": "cpu", "num_cores": 2, "torch": "2"}
    row = {"benchmark": "quality", "recipe": "r", "variant": variant, "seed": seed, "cost": cost}
    metrics = {"s/image_to_text_R@1": value, "s/image_to_text_R@5": 1.0, "h/zeroshot-top1": value}
    times = {"time_s": 10.0, "cpu_time_s": 9.0}
    return {**row, "metrics": metrics, "curve": curve, "size": size, **times, **where}


def test_the_page_says_when_the_inherited_student_is_as_good() -> None:
    rows = [
        row_of("RN, random half", 0, 0.30, [[15, 0.1], [60, 0.3]]),
        row_of("RN, manual half", 0, 0.40, [[15, 0.25], [30, 0.3], [60, 0.4]]),
        row_of("RN, random half", 1, 0.50, [[60, 0.5]]),
        row_of("RN, manual half", 1, 0.40, [[15, 0.25], [60, 0.4]]),
        # of other seeds
        row_of("RN, manual half", 7, 0.90, [[15, 0.9]]),
    ]
    speed = {"benchmark": "quality_speed", "images_per_second": 123.4, "texts_per_second": 5.0}
    rows.append({**speed, "variant": "RN, random half", "seed": 0, "commit": "def"})
    page = quality_tinyclip_table.page(rows, [0, 1], ["RN, manual half", "RN, random half"])
    assert "| RN, manual half | 0 | 30.0 | 40.0 | 30 | 60 | 0.50 |" in page
    assert "| RN, manual half | 1 | 50.0 | 40.0 |  | 60 | never |" in page
    assert "| RN, manual half over RN, random half | +0.0 | +10.0, -10.0 |" in page
    line = "| RN, random half | 0.600 | 3.750 | 123 | 5 | 40.0 \u00b1 14.1 | 40.0 \u00b1 14.1 |"
    assert line in page and "commit abc, def." in page
    assert "| 12 | 10 | 9 |" in page and "every 15 steps" in page
    assert page.index("| RN, manual half | 0.6") < page.index("| RN, random half | 0.6")


def test_finished_students_are_not_trained_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def training(words: list[str], log: Path, place: Path) -> str | None:
        calls.append(log.stem)
        if words[0] == "-m":
            return None
        return "exit code 1: the cause" if "auto_25" in log.stem else leave(words, log)

    def leave(words: list[str], log: Path) -> None:
        folder = log.with_suffix("")
        folder.mkdir(parents=True)
        step = {"step": 4, "time_s": 1.0, "step_time_ms": 2.0, "peak_memory_mib": 3.0, "loss": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        (folder / "eval.jsonl").write_text(json.dumps({"step": 4, "a/x_R@1": 0.1}) + "\n")

    monkeypatch.setattr(quality_tinyclip, "render_data", lambda *_: True)
    monkeypatch.setattr(quality_tinyclip, "about", lambda *_: {})
    monkeypatch.setattr(trainings, "run_here", training)
    for folder in quality_tinyclip.TEACHERS:
        (out / folder / "export").mkdir()
    words = ["--out", str(out), "--results", str(out / "table"), "--seeds", "1"]
    words += ["--variants", "ViT, manual half", "ViT, auto 25"]
    assert quality_tinyclip.main(words) == quality_tinyclip.race.WRONG
    prefix = "quality_tinyclip-vit"
    assert calls == ["teacher-half", "teacher_vit-half", f"{prefix}_manual_half-0",
                     f"{prefix}_auto_25-0"]  # fmt: skip
    calls.clear()
    quality_tinyclip.main(words)
    assert calls[2:] == [f"{prefix}_auto_25-0"]
    assert [("reason" in row) for row in rows_of(out / "table.jsonl")] == [False, True, True]


def test_another_cut_is_another_cell(out: Path) -> None:
    words = ["--recipe", "benchmarks/recipes/quality_tinyclip.toml", "--train.seed", "3"]
    one = cells.digest(words, out / "teacher", half={"width": 1})
    assert one != cells.digest(words, out / "teacher", half={"width": 2})
    assert one == cells.digest([*words, "--train.seed", "4"], out / "teacher", half={"width": 1})
    assert one != cells.digest([*words, "--optim.lr", "1"], out / "teacher", half={"width": 1})


def test_the_page_is_that_of_its_rows(repository: Path) -> None:
    folder = repository / "benchmarks" / "results"
    page = (folder / "quality_tinyclip.md").read_text()
    rows = rows_of(folder / "quality_tinyclip.jsonl")
    names = [*quality_tinyclip.WHOLE, *quality_tinyclip.variants(Path("out"))]
    assert quality_tinyclip_table.page(rows, [0, 1, 2], names) == page
