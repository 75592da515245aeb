# SPDX-License-Identifier: Apache-2.0
"""The recipes: fields that exist, commands that are true, and the two on photos end to end."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from kdengine.arguments import option_types
from kdengine.config import RECIPES, load_recipe, recipe_names

TEACHER, STUDENT = "clip_flickr8k", "clip_kd_flickr8k"
STEPS = 4
TEACHERS = {
    STUDENT: TEACHER,
    "demo_student_distilled": "demo_teacher",
    "comkd": "comkd_teacher",
    "promptkd": "comkd_teacher",
} | {
    name: "clip_vit_b16_cc"
    for name in recipe_names()
    if name.startswith("clip_kd_") and name.endswith("_cc")
}
RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all values of a recipe."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        yield from leaves(value, f"{name}.") if isinstance(value, dict) else [name]


def command(recipe: str) -> list[str]:
    """The command that the comment of a recipe tells."""
    text = (RECIPES / f"{recipe}.toml").read_text()
    (line,) = re.findall(r"^# .*?\b(deepspeed .*kdengine/train\.py.*)$", text, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_of_a_recipe_is_an_option(name: str) -> None:
    values = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    values.pop("base", None), values.pop("stages", None)
    options = {f"--{leaf}".replace("_", "-") for leaf in leaves(values)}
    assert options and options <= set(option_types())


@pytest.mark.parametrize("name", recipe_names())
def test_command_in_a_recipe_starts_that_recipe(name: str, repository: Path) -> None:
    words = command(name)
    assert words[words.index("--recipe") + 1] == name
    assert (repository / next(word for word in words if word.endswith(".py"))).is_file()


@pytest.mark.parametrize("name", recipe_names())
def test_models_of_a_recipe_can_be_had(name: str, repository: Path) -> None:
    config = load_recipe(name)
    ours = {path.stem for path in (repository / "kdengine/models/configs").glob("*.json")}
    model = config.model.model
    if found := re.fullmatch("local-dir:runs/(.*)/export", model):
        # of the stage before
        assert found[1] in recipe_names()
        model = "ViT-B-32"
    elif model.startswith("local-dir:"):
        # cut out of a teacher by a command that the recipe tells
        text = (RECIPES / f"{name}.toml").read_text()
        (words,) = re.findall(r"^# (kdengine inherit .*)$", text, re.MULTILINE)
        out, _, _, _, model = shlex.split(words)[2:]
        assert config.model.model == f"local-dir:{out}"
    assert model in ours | set(open_clip.list_models())
    published = open_clip.list_pretrained()
    assert all(tag is None or (model, tag) in published for model, tag in config.distill.teachers())


@pytest.mark.parametrize("student", TEACHERS)
def test_recipe_of_a_student_takes_the_export_of_its_teacher(student: str) -> None:
    run = load_recipe(TEACHERS[student]).run
    teacher = f"local-dir:{run.logs}/{run.name}/export"
    assert load_recipe(student).distill.distill_model == (teacher,)


class Done(NamedTuple):
    """What running both recipes left: runs, what each printed, the data folder before and after."""

    runs: Path
    index: Path
    printed: dict[str, str]
    before: dict[str, int]
    after: dict[str, int]


def launch(words: list[str], folder: Path, data: Path) -> str:
    """Run a recipe's command in a folder of its own; returns what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    binaries = Path(sys.executable).parent
    env = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "KDENGINE_TEST_DATA": str(data),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(binaries / words[0]), "--master_port", port, *words[1:]],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def look(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def done(repository: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Both recipes, run as their comments say, but shorter and on one shard."""
    folder = tmp_path_factory.mktemp("recipes")
    before, printed = look(test_data), {}
    for recipe in (TEACHER, STUDENT):
        words = command(recipe)
        words = [str(repository / word) if word.endswith(".py") else word for word in words]
        words += ["--data.train-data", str(test_data / "flickr8k-train-000.tar")]
        words += ["--data.index-dir", str(folder / "index"), "--run.no-tensorboard"]
        words += ["--train.steps", str(STEPS), "--train.batch-size", "16"]
        words += ["--optim.warmup", "2", "--run.log-every-n-steps", "1"]
        printed[recipe] = launch(words, folder, test_data)
    return Done(folder / "runs", folder / "index", printed, before, look(test_data))


@pytest.mark.parametrize(
    ("recipe", "terms"),
    [(TEACHER, {"loss/task"}), (STUDENT, {"loss/task", "loss/crd", "loss/fd", "loss/icl"})],
    ids=[TEACHER, STUDENT],
)
def test_recipe_trains_all_its_steps(done, records, recipe: str, terms: set[str]) -> None:
    found = records(done.runs / recipe)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert found[-1]["samples_seen"] == 2 * 16 * STEPS and found[-1]["num_skipped"] == 0
    assert {name for name in found[0] if name.startswith("loss/")} == terms
    assert all(r[name] is not None for r in found for name in ("loss", *terms))


@pytest.mark.parametrize("recipe", [TEACHER, STUDENT])
def test_recipe_writes_and_prints_the_retrieval_of_the_official_split(done, recipe: str) -> None:
    lines = (done.runs / recipe / "eval.jsonl").read_text().splitlines()
    (found,) = [json.loads(line) for line in lines]
    assert found["step"] == STEPS
    for name in RECALLS:
        assert 0 <= found[f"flickr8k-val/{name}"] <= 1
        assert name in done.printed[recipe]
    assert "flickr8k-val" in done.printed[recipe]
    # the split has 1,000 images, each a hit or not
    hits = 1000 * found["flickr8k-val/image_to_text_R@10"]
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert found["flickr8k-val/image_to_text_R@10"] >= found["flickr8k-val/image_to_text_R@1"]


@pytest.mark.parametrize("recipe", [TEACHER, STUDENT])
def test_export_of_a_recipe_is_its_student_in_open_clip(done, recipe: str) -> None:
    run = done.runs / recipe
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'export'}")
    (saved,) = (run / "checkpoints").glob(f"step_*{STEPS}/student.safetensors")
    weights = load_file(saved)
    assert weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name].reshape(value.shape)), name


def test_student_learns_from_the_export_of_the_first_recipe(done) -> None:
    header = (done.runs / STUDENT / "out.log").read_text()
    (teacher,) = re.findall(r"teacher: (.*)", header)
    assert f"local-dir:runs/{TEACHER}/export" in teacher and "frozen" in teacher


def test_data_folder_is_never_written(done) -> None:
    assert done.before and done.after == done.before


def train_all(rank: int, world_size: int, lines: list[list[str]]) -> list[int]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from kdengine.train import main

    return [main(line) for line in lines]


def test_zero_stages_of_a_recipe_give_the_same_losses(
    done, run_ranks, records, test_data, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("KDENGINE_TEST_DATA", str(test_data))
    shared = ["--recipe", STUDENT, "--run.logs", str(tmp_path), "--run.no-tensorboard"]
    shared += ["--data.train-data", str(test_data / "flickr8k-train-000.tar")]
    shared += ["--data.index-dir", str(done.index), "--eval.retrieval"]
    shared += ["--distill.distill-model", f"local-dir:{done.runs / TEACHER / 'export'}"]
    shared += ["--train.steps", "5", "--train.batch-size", "8", "--optim.warmup", "1"]
    shared += ["--run.log-every-n-steps", "1", "--run.save-every-n-steps", "0"]
    # with the terms that the recipe leaves out: heads, fusions and scales are sharded as well
    shared += ["--method.clip-kd.gd", "1e4", "--method.clip-kd.afd", "0.5"]
    lines = [[*shared, "--run.name", f"z{z}", "--train.zero-stage", str(z)] for z in range(4)]
    assert run_ranks(train_all, 2, lines, timeout=200) == [[0] * 4] * 2
    plain, *sharded = ([r["loss"] for r in records(tmp_path / f"z{z}")] for z in range(4))
    assert len(plain) == 5
    for run in sharded:
        assert run == pytest.approx(plain, rel=1e-4)
