# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: which one is meant, what is cleaned away, what is refused, a kill while saving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdengine import checkpoint
from kdengine.checkpoint.folder import FORMAT, prune
from kdengine.checkpoint.resume import IDENTITY as WORDS
from kdengine.config import Data, Model, Optim, Run, RunConfig, Train, to_dict
from kdengine.ranks import Ranks

ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
IDENTITY = {"num_samples": 96, "shards": "some", "teacher": 7, "engine": {"gradient_clipping": 1.0}}

# dies in the middle of the second save, when the files are written but not yet renamed
KILLED_WHILE_SAVING = """
import os, signal, sys
from kdengine.checkpoint import store
from kdengine.train import main
calls, sync_tree = [], store.sync_tree
def die_the_second_time(folder):
    calls.append(folder)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    sync_tree(folder)
store.sync_tree = die_the_second_time
main(sys.argv[1:])
"""


def fake(run: Path, *steps: int, **meta: Any) -> None:
    """Complete checkpoints of a run, without content."""
    for step in steps:
        folder = run / "checkpoints" / checkpoint.step_name(step)
        folder.mkdir(parents=True)
        meta = {"format": FORMAT, "student": {"model_cfg": {}}} | meta
        (folder / "run.json").write_text(json.dumps(meta))
        (run / "checkpoints" / "latest").write_text(folder.name)


@pytest.mark.parametrize("pointer", ["step_00000100", "step_00000050", "step_00000070", None])
def test_latest_is_the_newest_complete_one_whatever_the_pointer_says(
    pointer: str | None, tmp_path: Path
) -> None:
    """A kill between the rename of a checkpoint and the write of the pointer leaves it behind."""
    fake(tmp_path, 50, 100)
    file = tmp_path / "checkpoints" / "latest"
    if pointer is None:
        file.unlink()
    else:
        file.write_text(pointer + "\n")
    (tmp_path / "checkpoints" / "step_00000150").mkdir()  # without run.json: not complete
    assert checkpoint.find(tmp_path, "latest").name == "step_00000100"


def test_a_step_names_its_checkpoint(tmp_path: Path) -> None:
    fake(tmp_path, 50, 100)
    assert checkpoint.find(tmp_path, "50").name == "step_00000050"


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "latest") is None


def test_missing_checkpoint_is_an_error_that_lists_those_there(tmp_path: Path) -> None:
    fake(tmp_path, 50)
    with pytest.raises(FileNotFoundError, match="has: step_00000050"):
        checkpoint.find(tmp_path, str(tmp_path / "elsewhere"))


def test_clean_removes_partial_folders_and_mends_the_pointer(tmp_path: Path) -> None:
    fake(tmp_path, 100, 50)
    partial = tmp_path / "checkpoints" / ".partial_step_00000150"
    partial.mkdir()
    assert checkpoint.clean(tmp_path, 100) == []
    assert not partial.exists()
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000100"


def test_resuming_an_older_step_sets_later_ones_aside(tmp_path: Path) -> None:
    fake(tmp_path, 50, 100)
    (told,) = checkpoint.clean(tmp_path, 50)
    assert told.startswith("step_00000100 belongs to the abandoned history")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000050"]
    assert len(list((tmp_path / "checkpoints").glob("superseded_step_00000100_*"))) == 1


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    fake(tmp_path, 5, 50, 100)
    prune(tmp_path, 2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000050", "step_00000100"}


@pytest.mark.parametrize(
    ("changed", "ranks", "samples", "message"),
    [
        ({}, 2, 96, r"written by 2 ranks, this run has 1.*--model.pretrained"),
        ({}, 1, 90, "number of training samples changed.*: 90 became 96"),
        ({"train": Train(steps=9, batch_size=8)}, 1, 96, "train.batch_size was 8, is 128"),
        ({"optim": Optim(lr=0.5)}, 1, 96, "optim.lr was 0.5, is 0.001"),
        ({"model": Model(model="RN50")}, 1, 96, "model.model was 'RN50', is 'ViT-T-16'"),
    ],
    ids=["world size", "data", "batch size", "learning rate", "model"],
)
def test_resume_into_another_run_is_refused(tmp_path, changed, ranks, samples, message) -> None:
    old = to_dict(RunConfig(**{"train": Train(steps=9)} | changed))
    there = IDENTITY | {"num_samples": samples}
    fake(tmp_path, 5, world_size=ranks, identity=there, config=old)
    with pytest.raises(ValueError, match=message):
        checkpoint.check(
            checkpoint.find(tmp_path, "5"), RunConfig(train=Train(steps=9)), ONE, IDENTITY
        )


def test_a_cut_student_is_exported_for_a_run_of_other_ranks(tmp_path: Path) -> None:
    student = {"model_cfg": {"ragged": {}}}
    fake(tmp_path, 5, world_size=2, identity=IDENTITY, config={}, student=student)
    with pytest.raises(ValueError, match="weights with 'kdengine export .*step_00000005 OUT'"):
        checkpoint.check(checkpoint.find(tmp_path, "5"), RunConfig(), ONE, IDENTITY)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    fake(tmp_path, 5, format=FORMAT + 1)
    with pytest.raises(ValueError, match=f"this version reads {FORMAT}"):
        checkpoint.read_meta(checkpoint.find(tmp_path, "5"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("shards", "other"), ("teacher", 8), ("engine", {"gradient_clipping": 2.0})],
)
def test_resume_with_other_contents_is_refused(tmp_path, name, value) -> None:
    config = RunConfig(train=Train(steps=9))
    fake(tmp_path, 5, world_size=1, identity=IDENTITY, config=to_dict(config))
    with pytest.raises(ValueError, match=f"{WORDS[name][:12]}.* changed"):
        checkpoint.check(checkpoint.find(tmp_path, "5"), config, ONE, IDENTITY | {name: value})


def test_resume_may_find_the_same_contents_elsewhere(tmp_path: Path) -> None:
    there = RunConfig(train=Train(steps=9), data=Data(train_data="/old/0.tar"))
    here = RunConfig(train=Train(steps=9), data=Data(train_data="/new/0.tar"))
    fake(tmp_path, 5, world_size=1, identity=IDENTITY, config=to_dict(there))
    assert checkpoint.check(checkpoint.find(tmp_path, "5"), here, ONE, IDENTITY) == []


def test_resume_may_change_logging_and_announces_a_new_length(tmp_path: Path) -> None:
    config = to_dict(RunConfig(train=Train(steps=9)))
    fake(tmp_path, 5, world_size=1, identity=IDENTITY, config=config)
    new = RunConfig(train=Train(steps=12), run=Run(keep_last=7), data=Data(workers=9))
    (note,) = checkpoint.check(checkpoint.find(tmp_path, "5"), new, ONE, IDENTITY)
    assert note == "train.steps was 9, is 12: the learning rate follows the new length"


def test_new_run_does_not_write_into_another(tmp_path: Path) -> None:
    fake(tmp_path, 5)
    with pytest.raises(FileExistsError, match="--resume latest.*--run.name"):
        checkpoint.starting_point(tmp_path, None, ONE)


def test_random_state_round_trip_through_a_file(tmp_path: Path) -> None:
    torch.save(checkpoint.random_state(), tmp_path / "state.pt")
    import random

    import numpy as np

    first = (random.random(), np.random.rand(), torch.rand(1).item())
    checkpoint.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_kill_while_saving_leaves_the_previous_checkpoint(
    python: Callable[..., Any], train_here, words, records, tmp_path
) -> None:
    line = words("a", run__save_every_n_steps=2)
    assert python(["-c", KILLED_WHILE_SAVING, *line]).returncode == -9
    run = tmp_path / "runs" / "a"
    assert (run / "checkpoints" / ".partial_step_00000004").is_dir()
    assert checkpoint.find(run, "latest").name == "step_00000002"
    checkpoint.export_run(run, tmp_path / "exported")
    saved = load_file(run / "checkpoints" / "step_00000002" / "student.safetensors")
    exported = load_file(tmp_path / "exported" / "open_clip_model.safetensors")
    assert torch.equal(saved["visual.proj"], exported["visual.proj"])

    told = train_here([*line, "--resume", "latest"], words("whole"))
    assert [code for code, _ in told] == [0, 0], told
    assert not (run / "checkpoints" / ".partial_step_00000004").exists()
    whole = records(tmp_path / "runs" / "whole")
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in whole]


def test_export_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="saved at least once"):
        checkpoint.export_run(tmp_path, tmp_path / "out")


def test_a_damaged_checkpoint_is_named_with_an_older_one(train_here, words, tmp_path: Path) -> None:
    line = words("a", run__save_every_n_steps=2)
    assert train_here(line)[0][0] == 0
    run = tmp_path / "runs" / "a"
    *_, older, newest = checkpoint.checkpoints(run)
    for name in ("student.safetensors", "rank_00000.pt"):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(RuntimeError, match=f"{newest.name} cannot be read.*{older.name}"):
        checkpoint.export_run(run, tmp_path / "out")
    ((code, error),) = train_here([*line, "--resume", "latest"])
    assert code is None
    assert f"{newest.name} cannot be read" in error and older.name in error
