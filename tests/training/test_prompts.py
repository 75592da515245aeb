# SPDX-License-Identifier: Apache-2.0
"""Both stages of ComKD-CLIP by the real command, on three classes of noise, in one process."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdengine.models import build_student, export_student, load_model

NAMES = ["red thing", "green thing", "blue thing"]
PER_CLASS = 16


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes that differ in colour, and its split file."""
    folder = tmp_path_factory.mktemp("coloured")
    draw = np.random.default_rng(0)
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        (folder / "set" / name).mkdir(parents=True)
        for n in range(PER_CLASS + 8):
            pixels = draw.integers(0, 90, (36, 36, 3))
            pixels[..., label] += 150
            key = f"{name}/{n}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "set" / key)
            part = "train" if n < PER_CLASS else "val" if n < PER_CLASS + 4 else "test"
            parts[part].append([key, label, name])
    (folder / "split.json").write_text(json.dumps(parts))
    return folder


@pytest.fixture(scope="session")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of another width than the student, with random weights."""
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads(tiny.read_text())
    (folder / "wide.json").write_text(json.dumps({**config, "embed_dim": 48}))
    made = build_student(str(folder / "wide.json"), seed=5)
    export_student(made.tower.clip.state_dict(), made.spec, folder / "export")
    return f"local-dir:{folder / 'export'}"


def line(name: str, folder: Path, **fields: Any) -> list[str]:
    """The command line of a run on the coloured classes, under a folder."""
    values = {
        "data__train_data": folder / "set",
        "data__index_dir": folder / "index",
        "data__workers": 1,
        "classes__split": folder / "split.json",
        "prompt__depth": 1,
        "prompt__image_tokens": 2,
        "train__batch_size": 8,
        "train__zero_stage": 1,
        "optim__warmup": 0,
        "optim__lr": 3e-2,
        "optim__lr_scheduler": "const",
        "run__logs": folder / "runs",
        "run__name": name,
        "run__log_every_n_steps": 1,
    } | fields
    words = ["--run.no-tensorboard"]
    for key, value in values.items():
        words.append(f"--{key.replace('__', '.').replace('_', '-')}")
        words += [] if value is True else [str(value)]
    return words


@pytest.fixture(scope="session")
def runs(coloured: Path, wide: str, tiny: Path, train_here: Callable[..., Any]) -> Path:
    """The folder of all runs of this file, once they are done."""
    folder = coloured / "runs"
    first = {"model__model": wide, "method__name": "comkd_teacher"}
    second = {
        "method__name": "comkd",
        "model__model": tiny,
        "distill__distill_model": f"local-dir:{folder / 'teacher' / 'export'}",
        "train__steps": 8,
    }
    one, two = coloured / "one.toml", coloured / "two.toml"
    one.write_text(
        f'[model]\nmodel = "{wide}"\n[classes]\nhalf = "base"\n'
        '[method]\nname = "comkd_teacher"\n[run]\nname = "one"\n'
    )
    two.write_text(
        f'base = "{one}"\n[model]\nmodel = "{tiny}"\n[classes]\nhalf = "all"\n'
        '[distill]\ndistill_model = "local-dir:runs/one/export"\n[method]\nname = "comkd"\n'
    )
    (coloured / "both.toml").write_text(f'stages = ["{one}", "{two}"]\n')
    selected = {
        # far too much: it gets worse again
        "optim__lr": 0.5,
        "train__steps": 6,
        "eval__zeroshot": f"val={coloured}/set;{coloured}/split.json:val",
        "eval__val_frequency": 1,
        "eval__select": "val/zeroshot-mean-per-class-recall",
        "run__save_every_n_steps": 1,
        "run__keep_last": 9,
    }
    few = {"classes__shots": 8, "classes__half": "base", "train__steps": 40}
    lines = [
        line("teacher", coloured, **first, **few),
        line("student", coloured, **second),
        line("half", coloured, **second | {"train__steps": 4}, run__save_every_n_steps=4),
        [*line("half", coloured, **second), "--run.resume", "latest"],
        line("texts", coloured, **second, method__comkd__recompute_texts=True),
        ["--recipe", str(coloured / "both.toml")]
        + line("both", coloured, train__steps=2, optim__name="sgd"),
        line("selected", coloured, **first, **selected),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    codes = train_here(*lines, env=environment, timeout=500)
    assert [code for code, _ in codes] == [0] * len(lines), codes
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "open_clip_model.safetensors")


def test_the_first_stage_trains_prompts_in_both_towers_and_nothing_else(
    runs: Path, wide: str, records: Any
) -> None:
    steps = records(runs / "teacher")
    assert steps[-1]["loss/task"] < 0.5 * steps[0]["loss/task"]
    before = load_file(Path(wide.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    after = weights(runs / "teacher")
    assert set(after) - set(before) == {"visual.transformer.prompts", "transformer.prompts"}
    assert all(torch.equal(after[name], before[name]) for name in before)
    told = (runs / "teacher" / "out.log").read_text()
    assert "2 of 3 (base), 8 shots" in told and "16 of 48 that may be trained on" in told


def test_the_second_stage_trains_visual_prompts_and_bridge_and_nothing_else(
    runs: Path, tiny: Path, records: Any
) -> None:
    student = weights(runs / "student")
    for name, value in weights(runs / "teacher").items():
        if not name.startswith(("visual.", "logit_")):
            assert torch.equal(student[name], value), name
    for name, value in build_student(str(tiny), seed=0).tower.clip.state_dict().items():
        if name.startswith("visual."):
            assert torch.equal(student[name], value), name
    assert student["visual.bridge.attention.texts"].shape == (3, 48)
    assert student["visual.bridge.attention.gate"].abs() > 1e-3
    assert "3 class texts, encoded once" in (runs / "student" / "out.log").read_text()
    steps = records(runs / "student")
    assert {"loss/kl", "loss/align", "gate", "agreement"} <= set(steps[0])
    assert steps[0]["gate"] == 0 != steps[-1]["gate"]
    assert load_model(runs / "student" / "export").spec.embed_dim == 48


@pytest.mark.parametrize("other", ["half", "texts"], ids=["resumed", "texts in each step"])
def test_a_run_is_the_same_bit_by_bit(runs: Path, other: str) -> None:
    wanted, found = weights(runs / "student"), weights(runs / other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_one_command_runs_both_stages(runs: Path) -> None:
    first, second = weights(runs / "both" / "one"), weights(runs / "both" / "two")
    assert torch.equal(first["transformer.prompts"], second["transformer.prompts"])
    assert "visual.bridge.attention.texts" in second


def test_the_export_is_the_student_of_the_best_validation(runs: Path) -> None:
    run = runs / "selected"
    rows = [json.loads(text) for text in (run / "eval.jsonl").read_text().splitlines()]
    values = [row["val/zeroshot-mean-per-class-recall"] for row in rows]
    config = json.loads((run / "export" / "open_clip_config.json").read_text())
    best = values.index(max(values)) + 1
    assert len(values) == 6 and config["kdengine"]["step"] == best
    saved = load_file(run / "checkpoints" / f"step_{best:08d}" / "student.safetensors")
    name = "visual.transformer.prompts"
    assert torch.equal(weights(run)[name], saved[name])
    meta = json.loads((run / "checkpoints" / "step_00000006" / "run.json").read_text())
    assert meta["state"]["best"] == max(values)
