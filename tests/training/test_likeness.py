# SPDX-License-Identifier: Apache-2.0
"""Likeness to the teacher in a run: at logged steps only, the mean over ranks, under ZeRO-3 too."""

import json
import os
from pathlib import Path

import pytest

STAGES = (0, 3)
NAMES = {"cosine/image", "cosine/text", "cka/image", "cka/text"}


def watched(rank: int, world_size: int, lines: list[list[str]]) -> list[list[dict[str, float]]]:
    """Train, and tell for every step what this rank computed of the likeness."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from kdengine.methods import Distillation
    from kdengine.train import main

    forward, told = Distillation.forward, []

    def noting(self, *inputs):
        loss, terms = forward(self, *inputs)
        told[-1].append({name: x.item() for name, x in terms.items() if "/" in name})
        return loss, terms

    Distillation.forward = noting
    for line in lines:
        told.append([])
        assert main(line) == 0
    return told


@pytest.fixture
def teacher(tiny: Path, tmp_path: Path) -> Path:
    """An exported model of another width."""
    from kdengine import models

    config = tmp_path / "teacher.json"
    config.write_text(json.dumps(json.loads(tiny.read_text()) | {"embed_dim": 48}))
    tower, spec = models.build_student(str(config), seed=1)
    models.export_student(tower.state_dict(), spec, tmp_path / "teacher")
    return tmp_path / "teacher"


def test_logged_steps_hold_the_mean_over_ranks_of_each_ranks_own_batch(
    run_ranks, words, records, teacher, tmp_path
) -> None:
    settings = {"method__name": "clip_kd", "distill__distill_model": f"local-dir:{teacher}"}
    settings |= {"train__steps": 5, "run__log_every_n_steps": 2}
    lines = [words(f"{stage}", train__zero_stage=stage, **settings) for stage in STAGES]
    told = run_ranks(watched, 2, lines, timeout=240)
    runs = [records(tmp_path / "runs" / f"{stage}") for stage in STAGES]
    for run, *ranks in zip(runs, *told, strict=True):
        assert [r["step"] for r in run] == [2, 4, 5]
        for steps in ranks:
            assert [set(step) for step in steps] == [set(), NAMES, set(), NAMES, NAMES]
        for record in run:
            own = [steps[record["step"] - 1] for steps in ranks]
            for name in NAMES:
                values = [rank[name] for rank in own]
                assert record[name] == pytest.approx(sum(values) / 2, rel=1e-5)
                assert values[0] != values[1]
    for plain, sharded in zip(*runs, strict=True):
        assert [sharded[n] for n in NAMES] == pytest.approx([plain[n] for n in NAMES], abs=1e-3)
    out = (tmp_path / "runs" / "0" / "out.log").read_text()
    assert "step 5/5" in out and "cosine" not in out and "cka" not in out
