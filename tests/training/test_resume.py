# SPDX-License-Identifier: Apache-2.0
"""A run that was interrupted and resumed is the run that was not, to the last bit."""

import dataclasses
import os
import signal

from kdengine.checkpoint.resume import differences
from kdengine.config import ClipKD, Distill, Method, RunConfig, to_dict

MODES = [(0, "fp32", 1), (1, "bf16", 1), (2, "fp32", 3), (3, "amp_bf16", 1), (3, "amp_bf16", 2)]


def whole_and_in_parts(
    rank: int, world_size: int, lines: list[tuple[list[str], list[str]]], at_step: int
) -> list[tuple[int, int, int]]:
    """Train the first line of each pair; train the second with SIGTERM to rank 1, and resume it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from kdengine import loop, train

    run_step = loop.run_step

    def signalled(job, **options):
        if job.folder.name.startswith("part") and (rank, job.state.step) == (1, at_step):
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(job, **options)

    codes = []
    for whole, part in lines:
        loop.run_step = signalled
        first, second = train.main(whole), train.main(part)
        loop.run_step = run_step
        codes.append((first, second, train.main([*part, "--resume", "latest"])))
    return codes


def test_resumed_run_is_bit_equal(run_ranks, words, records, tmp_path) -> None:
    options = {"train__steps": 9, "data__caption": "random"}
    lines = []
    for stage, precision, accum_freq in MODES:
        fields = options | {"train__zero_stage": stage, "train__precision": precision}
        fields |= {"train__accum_freq": accum_freq, "train__batch_size": 16 // accum_freq}
        name = f"{stage}-{precision}-{accum_freq}"
        lines.append((words(f"whole-{name}", **fields), words(f"part-{name}", **fields)))
    codes = run_ranks(whole_and_in_parts, 2, lines, 4, timeout=300)
    assert codes == [[(0, 75, 0)] * len(MODES)] * 2
    for stage, precision, accum_freq in MODES:
        name = f"{stage}-{precision}-{accum_freq}"
        whole = records(tmp_path / "runs" / f"whole-{name}")
        part = records(tmp_path / "runs" / f"part-{name}")
        assert [r["step"] for r in part] == list(range(1, 10))
        for name in ("loss", "scale", "grad_norm", "lr", "samples_seen"):
            mode = (stage, precision, accum_freq, name)
            assert [r[name] for r in part] == [r[name] for r in whole], mode


def test_a_checkpoint_from_before_a_setting_had_its_default() -> None:
    config = RunConfig(distill=Distill(distill_model=("ViT-B-16",)))
    old = to_dict(config)
    old["distill"] = {"distill_model": "ViT-B-16"}
    del old["method"]["clip_kd"]["teacher_features"]
    assert differences({"config": old}, config) == {}
    changed = Method(clip_kd=ClipKD(teacher_features="mean", fd=1.0))
    assert differences({"config": old}, dataclasses.replace(config, method=changed)) == {
        "method.clip_kd.fd": (2000.0, 1.0),
        "method.clip_kd.teacher_features": ("concat", "mean"),
    }


def test_resume_of_a_finished_run_ends_at_once(train_here, words, records, tmp_path) -> None:
    line = words("a", train__steps=2)
    told = train_here(line, [*line, "--resume", "latest"])
    assert [code for code, _ in told] == [0, 0], told
    assert [r["step"] for r in records(tmp_path / "runs" / "a")] == [1, 2]


def test_resume_latest_of_nothing_starts_anew_and_says_so(train_here, words, tmp_path) -> None:
    ((code, error),) = train_here([*words("a", train__steps=1), "--resume", "latest"])
    assert code == 0, error
    assert "has no checkpoint, so this run starts anew" in (tmp_path / "runs/a/out.log").read_text()


def test_new_run_in_the_folder_of_another_is_refused(train_here, words) -> None:
    line = words("a", train__steps=1)
    (_, first), (code, error) = train_here(line, line)
    assert first == "" and code is None
    assert "holds a run already; go on with --resume latest" in error
