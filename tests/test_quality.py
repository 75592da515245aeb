# SPDX-License-Identifier: Apache-2.0
"""What losses buy: the table's arithmetic, its variants, and what is not run twice."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, demo_seeds, quality, quality_table, trainings
from kdengine import reference
from kdengine.config import load_recipe, to_toml


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gds_weight_is_one_of_the_papers_and_keeps_the_weighted_loss() -> None:
    assert quality.gd_weight(1024, 512) == 1e6
    assert quality.gd_weight(128, 128) == 3906.25
    weighted = []
    for rows, width in ((64, 32), (256, 128)):
        x = [torch.nn.functional.normalize(torch.randn(rows, width).double(), dim=1)
             for _ in range(4)]  # fmt: skip
        loss = reference.gradient(x[0], x[1], 10.0, x[2], x[3], 10.0)
        weighted.append(quality.gd_weight(rows, width) * loss.item())
    # 64 times the loss, if the weight stayed
    assert 0.5 < weighted[0] / weighted[1] < 2


def row_of(variant: str, seed: int, **metrics: float) -> dict[str, Any]:
    cost, terms = {"steps": 4}, {"loss": [2.0, 1.0]}
    row = {"recipe": "r", "variant": variant, "seed": seed, "metrics": metrics, "cost": cost}
    where = {"commit": "abc", "device": "cpu", "num_cores": 2, "torch": "2"}
    return {**row, "terms": terms, "time_s": 10.0 * (seed + 1), **where}


def test_table_of_quality_has_means_spreads_gains_and_misses() -> None:
    tables = {"no KD": ((0.10, 0.50), (0.20, 0.40)), "FD": ((0.30, 0.45), (0.50, 0.47))}
    rows = {
        (name, seed): row_of(name, seed, **{"a/x_R@1": first, "b/zeroshot-top1": second})
        for name, values in tables.items()
        for seed, (first, second) in enumerate(values)
    }
    found = quality_table.results(rows)
    fd = found["FD"]
    assert fd.means["a/x_R@1"] == pytest.approx(40) and fd.time_s == 15
    assert fd.spreads["a/x_R@1"] == pytest.approx(math.sqrt(200))
    assert fd.gains["a/x_R@1"] == pytest.approx([20, 30])
    assert fd.gains["b/zeroshot-top1"] == pytest.approx([-5, 7])
    assert fd.mean_gain == pytest.approx(13) and list(fd.behind) == ["b/zeroshot-top1"]
    columns, lines = quality_table.table(found)
    assert lines[1] == [
        "FD",
        "40.0 \u00b1 14.1",
        "46.0 \u00b1 1.4",
        "+13.0",
        "1 of 2",
        "+3.7",
        "15",
    ]
    assert lines[0][3:5] == ["", ""] and columns[1:3] == ["a/x_R@1", "b/top1"]
    (miss,) = quality_table.misses(found, rows)
    assert "FD: b/top1 (+1.0, worst -5.0)" in miss and "loss 2 to 1" in miss
    assert "| FD | 40.0 \u00b1 14.1 |" in quality_table.page(found, rows)


def fake_training(words: list[str], log: Path, out: Path) -> str | None:
    """What a training leaves; GD fails."""
    if words[0] == "-m":
        return None
    values = dict(zip(words[1::2], words[2::2], strict=False))
    folder = Path(values["--run.logs"]) / values["--run.name"]
    (folder / "export").mkdir(parents=True)
    config = load_recipe("demo_teacher")
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "export" / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 128}}')
    if "-gd-" in folder.name:
        return "exit code 1: the cause"
    step = {"step": 4, "time_s": 1.0, "step_time_ms": 2.0, "peak_memory_mib": 3.0, "loss": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    seed = int(values.get("--train.seed", 0))
    metrics = {"step": 4, "a/x_R@1": 0.1 + seed / 100, "a/mean_rank": 7.0}
    (folder / "eval.jsonl").write_text(json.dumps(metrics) + "\n")
    return None


def test_finished_cells_are_not_run_again_and_failed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls: list[str] = []

    def training(words: list[str], log: Path, out: Path) -> str | None:
        name = words[words.index("--run.name") + 1] if words[0] != "-m" else "cache"
        calls.append(name.removeprefix("quality_demo-"))
        return fake_training(words, log, out)

    monkeypatch.setenv("KDENGINE_DEMO", "")
    monkeypatch.setattr(quality, "render_data", lambda *_: True)
    monkeypatch.setattr(trainings, "run_here", training)
    words = ["--recipe", "benchmarks/recipes/quality_demo.toml", "--out", str(tmp_path / "out")]
    words += ["--results", str(tmp_path / "table"), "--variants", "no KD", "GD"]
    words += ["CLIP-KD, cached", "--seeds"]
    assert quality.main([*words, "1"]) == quality.race.WRONG
    assert calls == ["teacher", "cache", "no_kd-0", "gd-0", "clip_kd_cached-0"]
    reason = [row for row in rows_of(tmp_path / "table.jsonl") if "reason" in row]
    assert [row["variant"] for row in reason] == ["GD"] and "the cause" in reason[0]["reason"]
    calls.clear()
    quality.main([*words, "2"])
    assert calls == ["cache", "gd-0", "no_kd-1", "gd-1", "clip_kd_cached-1"]
    assert "| CLIP-KD, cached | 10.5 \u00b1 0.7 |" in (tmp_path / "table.md").read_text()
    # as in the list, whatever ended first
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines if " \u00b1 " in line and line[0] == "|"] == [
        "| no KD",
        "| CLIP-KD, cached",
    ]
    calls.clear()
    # other settings are another cell, another place is not
    quality.main([*words, "1", "--", "--train.steps", "9"])
    assert calls == ["cache", "no_kd-0", "gd-0", "clip_kd_cached-0"]
    calls.clear()
    quality.main([*words, "2", "--", "--data.workers", "2"])
    assert calls == ["gd-0", "gd-1"]


def test_variants_differ_in_the_method_alone_and_have_the_papers_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", "runs/demo")
    recipe = str(quality.RECIPES / "quality_demo.toml")
    configs = {
        name: quality.arguments.parse(["--recipe", recipe, *words])
        for name, words in quality.variants(128, 128, Path("cache")).items()
    }
    weights = {name: vars(config.method.clip_kd) for name, config in configs.items()}
    terms = ("task", "crd", "fd", "icl", "gd", "afd")
    told = {
        name: {t: w[t] for t in terms if w[t]} for name, w in weights.items() if name != "no KD"
    }
    assert told == {
        "CRD": {"task": 1.0, "crd": 1.0},
        "FD": {"task": 1.0, "fd": 2000.0},
        "MFD": {"task": 1.0, "fd": 2000.0},
        "ICL": {"task": 1.0, "icl": 1.0},
        "GD": {"task": 1.0, "gd": 3906.25},
        "AFD": {"task": 1.0, "afd": 1.0},
        "CLIP-KD": {"task": 1.0, "crd": 1.0, "fd": 2000.0, "icl": 1.0},
        "CLIP-KD, cached": {"task": 1.0, "crd": 1.0, "fd": 2000.0, "icl": 1.0},
    }
    stored = {name for name, config in configs.items() if config.distill.cache}
    assert stored == {"CLIP-KD, cached"}
    assert {name for name, w in weights.items() if w["mask_ratio"]} == {"MFD"}
    assert all(w["fd_reduction"] == "mean" for name, w in weights.items() if name != "no KD")
    assert configs["no KD"].method.name == "clip"
    first = configs["no KD"]
    for config in configs.values():
        assert (config.data, config.model, config.optim, config.train) == (
            first.data, first.model, first.optim, first.train)  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(quality.TEACHERS))
def test_recipes_of_quality_load(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", "runs/demo")
    config = load_recipe(str(quality.RECIPES / f"{recipe}.toml"))
    assert config.eval.retrieval and config.eval.zeroshot and config.train.steps
    assert load_recipe(quality.TEACHERS[recipe]).method.name == "clip"


def test_mfd_is_left_out_for_a_student_without_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", "runs/demo")
    reason = quality.why_no_mask(load_recipe(str(quality.RECIPES / "quality_demo.toml")))
    assert reason and "ModifiedResNet" in reason
    vit = quality.why_no_mask(load_recipe(str(quality.RECIPES / "quality_demo_vit.toml")))
    assert vit is None


def test_an_unknown_variant_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", "")
    monkeypatch.setattr(quality, "render_data", lambda *_: True)
    monkeypatch.setattr(trainings, "run_here", fake_training)
    words = ["--recipe", "benchmarks/recipes/quality_demo.toml", "--out", str(tmp_path / "out")]
    words += ["--results", str(tmp_path / "table"), "--variants", "Nope"]
    assert quality.common.command(lambda: quality.main(words)) == 2
    assert capsys.readouterr().err.startswith("error: --variants: ['Nope'] came; there are 'no KD'")


def test_seeds_are_a_number_a_range_or_a_list() -> None:
    assert cells.seed_range("3") == [0, 1, 2]
    assert cells.seed_range("10-12") == [10, 11, 12]
    assert cells.seed_range("1,5") == [1, 5]
    for wrong in ("0", "3-1", "x", "1,"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number of seeds"):
            cells.seed_range(wrong)


def test_the_page_of_the_demo_is_that_of_its_rows(repository: Path) -> None:
    folder = repository / "benchmarks" / "results"
    page = (folder / "demo_seeds.md").read_text()
    assert demo_seeds.markdown(rows_of(folder / "demo_seeds.jsonl")) == page
