# SPDX-License-Identifier: Apache-2.0
"""Training on a GPU in low precision: it learns, and a resumed run repeats it to the last bit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODES = [(stage, precision) for precision in ("amp_bf16", "bf16") for stage in range(4)]
STEPS, SAVED = 8, 4
STUDENT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 1,
    },
}

# trains every line, then again from its checkpoint in the middle; kernels that add in any order
# would hide what is tested
TRAIN_TWICE = f"""
import json, shutil, sys, torch
from pathlib import Path
from kdengine.train import main
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = False
for folder, words in json.loads(sys.argv[1]):
    assert main(words) == 0
    shutil.copy(Path(folder, "metrics.jsonl"), Path(folder, "whole.jsonl"))
    assert main([*words, "--resume", "{SAVED}"]) == 0
"""


def name_of(stage: int, precision: str) -> str:
    return f"{stage}-{precision}"


@pytest.fixture(scope="module")
def runs(repository, picture, encode, write_shard, tmp_path_factory) -> Path:
    """The folder of a teacher and of its students, one for every mode and one in fp32."""
    for package in ("deepspeed", "open_clip", "nvidia.dali", "tyro"):
        pytest.importorskip(package, reason="training needs it")
    folder = tmp_path_factory.mktemp("training")
    (folder / "student.json").write_text(json.dumps(STUDENT))
    images = [encode(picture(number, (40, 36)), "JPEG") for number in range(64)]
    captions = [f"picture number {number} of the set".encode() for number in range(64)]
    samples = [{"jpg": a, "txt": b} for a, b in zip(images, captions, strict=True)]
    shard = write_shard(folder / "0.tar", samples)

    def line(name: str, precision: str, stage: int, *more: str) -> tuple[str, list[str]]:
        words = ["--model.model", str(folder / "student.json"), "--data.train-data", shard]
        words += ["--data.workers", "2", "--data.shuffle-buffer", "32"]
        words += ["--train.batch-size", "32", "--train.steps", str(STEPS), "--optim.warmup", "2"]
        words += ["--train.precision", precision, "--train.zero-stage", str(stage)]
        words += ["--run.logs", str(folder), "--run.name", name, "--run.log-every-n-steps", "1"]
        words += ["--run.save-every-n-steps", str(SAVED), "--run.no-tensorboard", *more]
        return str(folder / name), words

    distil = ("--distill.distill-model", f"local-dir:{folder / 'teacher' / 'export'}")
    lines = [line("teacher", "fp32", 1, "--method.name", "clip"), line("fp32", "fp32", 1, *distil)]
    lines += [line(name_of(stage, x), x, stage, *distil) for stage, x in MODES]
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_TWICE, json.dumps(lines)],
        env={**os.environ, "PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "ranks: 1 on cuda" in (folder / "fp32" / "out.log").read_text()
    return folder


def records(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_resumed_run_is_bit_equal(runs, stage, precision) -> None:
    run = runs / name_of(stage, precision)
    whole, resumed = records(run, "whole.jsonl"), records(run)
    assert [r["step"] for r in resumed] == list(range(1, STEPS + 1))
    assert f"resumed from {run}/checkpoints/step_{SAVED:08d}" in (run / "out.log").read_text()
    # that these steps were taken anew
    assert [r["time_s"] for r in resumed[SAVED:]] != [r["time_s"] for r in whole[SAVED:]]
    for name in ("loss", "loss/task", "loss/crd", "loss/fd", "loss/icl", "scale", "grad_norm"):
        assert [r[name] for r in resumed] == [r[name] for r in whole], name


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_low_precision_starts_like_fp32_and_learns(runs, stage, precision) -> None:
    found, exact = records(runs / name_of(stage, precision), "whole.jsonl"), records(runs / "fp32")
    losses = [r["loss"] for r in found]
    assert found[-1]["num_skipped"] == 0 and all(map(math.isfinite, losses))
    assert found[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-2)
    assert losses[-1] < losses[0]
