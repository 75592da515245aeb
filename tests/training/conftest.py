# SPDX-License-Identifier: Apache-2.0
"""Tiny trainings: a student of two thin towers, 96 small photos of noise, one or two CPU ranks."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TINY = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}

# runs main() on each list of words in one process, and reports the exit codes or errors
SEVERAL = """
import json, sys, traceback
from kdengine.train import main
told = []
for words in json.loads(sys.argv[1]):
    try:
        told.append([main(words), ""])
    except Exception as error:
        told.append([None, "".join(traceback.format_exception(error))])
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks do not share a GPU; and threads of several ranks would fight for the cores."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of the student."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of 48 pairs each, every picture of its own colour and with its own caption."""
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(48):
                number = 48 * shard + i
                pixels = draw.integers(0, 60, (40, 36, 3)) + draw.integers(0, 190, 3)
                picture = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(picture, "JPEG")
                caption = f"picture number {number} of the set".encode()
                for ending, data in (("jpg", picture.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00000..00001}}.tar"


@pytest.fixture
def words(tiny: Path, shards: str, tmp_path: Path) -> Callable[..., list[str]]:
    """``words(name, section__key=value, ...)``: the command line of a tiny run under tmp_path."""

    def build(name: str, **fields: Any) -> list[str]:
        values: dict[str, Any] = {
            "model__model": tiny,
            "method__name": "clip",
            "data__train_data": shards,
            "data__workers": 1,
            "data__shuffle_buffer": 32,
            "train__batch_size": 16,
            "train__steps": 6,
            "optim__warmup": 2,
            "run__logs": tmp_path / "runs",
            "run__name": name,
            "run__log_every_n_steps": 1,
        } | fields
        line = ["--run.no-tensorboard"]
        for key, value in values.items():
            line += [f"--{key.replace('__', '.').replace('_', '-')}", str(value)]
        return line

    return build


@pytest.fixture(scope="session")
def python(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python(words)``: the interpreter of the tests, with both source roots on its path."""
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": paths}
        options = {"env": env, "capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run([sys.executable, *words], **options)

    return run


@pytest.fixture(scope="session")
def train_here(python: Callable[..., Any]) -> Callable[..., list[tuple[int | None, str]]]:
    """``train_here(words, ...)``: main() on each list of words, all in one fresh process.

    Keywords are those of ``subprocess.run``. Returns exit code and error text of each. A fresh
    process, because a training engine leaves a process group behind.
    """

    def run(*lines: list[str], **options: Any) -> list[tuple[int | None, str]]:
        done = python(["-c", SEVERAL, json.dumps(lines)], **options)
        told = [x for x in done.stdout.splitlines() if x.startswith("TOLD")]
        assert told, done.stdout + done.stderr
        return [tuple(x) for x in json.loads(told[0].removeprefix("TOLD"))]

    return run


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """``records(run)``: what metrics.jsonl of a run holds."""

    def read(run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def teacher(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported teacher: twice the student's width and size, another context length."""
    from kdengine.models import build_student, export_student

    config = json.loads(tiny.read_text())
    config["embed_dim"], config["vision_cfg"]["image_size"] = 64, 48
    config["text_cfg"]["context_length"] = 24
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(config))
    student = build_student(str(folder / "config.json"), seed=3)
    export_student(student.tower.clip.state_dict(), student.spec, folder / "export")
    return folder / "export"


@pytest.fixture(scope="session")
def command(teacher: Path, shards: str) -> Callable[..., list[str]]:
    """``command(out, *more)``: words of 'kdengine cache' over the tiny shards."""

    def build(out: Path, *more: str) -> list[str]:
        words = [str(out), "--data.train-data", shards, "--data.workers", "1", *more]
        return [*words, "--distill.distill-model", f"local-dir:{teacher}"]

    return build


@pytest.fixture(scope="session")
def run(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(words)``: the interpreter of the tests on a CPU, with both source roots on its path."""
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def start(words: list[str]) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *words]
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)

    return start


@pytest.fixture(scope="session")
def caches(command: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of two views in each storage; not to be changed."""
    root = tmp_path_factory.mktemp("caches")
    found = {storage: root / storage for storage in ("fp32", "bf16", "int8")}
    sizes = ["--views", "2", "--batch-size", "20"]
    lines = [command(out, *sizes, "--storage", name) for name, out in found.items()]
    several = "import json, sys; from kdengine.precompute import command; "
    several += "print([command(words) for words in json.loads(sys.argv[1])])"
    done = run(["-c", several, json.dumps(lines)])
    assert done.returncode == 0 and "[0, 0, 0]" in done.stdout, done.stdout + done.stderr
    assert "2 of 96 samples" in done.stdout and "int8, error mean" in done.stdout, done.stdout
    return found


def _stopped_and_resumed(
    rank: int, world_size: int, lines: list[tuple[list[str], int]]
) -> list[tuple[int, int]]:
    """Train each line, with SIGTERM to rank 1 in the step before the one given, and resume it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from kdengine import loop, train

    run_step, codes = loop.run_step, []
    for line, stop in lines:

        def signalled(job: Any, stop: int = stop, **options: Any) -> Any:
            if (rank, job.state.step) == (1, stop - 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return run_step(job, **options)

        loop.run_step = signalled if stop else run_step
        first = train.main(line)
        loop.run_step = run_step
        codes.append((first, train.main([*line, "--resume", "latest"]) if stop else 0))
    return codes


@pytest.fixture(scope="session")
def stopped_and_resumed() -> Callable[..., list[tuple[int, int]]]:
    """For ``run_ranks``, of pairs of a command line and a step to stop at, 0 for none."""
    return _stopped_and_resumed
