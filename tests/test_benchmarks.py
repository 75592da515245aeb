# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, refuse to time what is wrong, and survive what crashes."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_assign,
    bench_feature,
    bench_similarity,
    common,
    plot,
    problems,
    race,
    run_all,
)
from kdengine import ops
from kdengine.ops import extension, feature_torch, similarity_torch
from kdengine_kernels import similarity as kernels

SMALL = ["--threads", "1", "--seconds", "0.02"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_whole_runs_on_a_cpu(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "benchmarks/run_all.py", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--parts", "smoke,feature", "--minutes", "2"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    smoke = rows_of(tmp_path / "smoke.jsonl")
    assert len(smoke) >= 18 and all(row["errors"] and row["reason"] is None for row in smoke)
    built = not extension.why_not("cpu")
    assert {row["backend"] for row in smoke} == {"triton"} | ({"cuda"} if built else set())
    feature = rows_of(tmp_path / "feature.jsonl")
    assert {row["case"] for row in feature} == {"feature", "towers", "moments"}
    assert all(row["forward_backward"] for row in feature)
    assert json.loads((tmp_path / "environment.json").read_text())["torch"]
    told = (tmp_path / "summary.txt").read_text()
    assert "smoke: done" in told and "feature: done" in told
    assert "ok    float32 triton InfoNCE" in (tmp_path / "log.txt").read_text()


def test_rows_have_times_errors_and_shares_and_can_be_drawn(tmp_path: Path) -> None:
    file, pictures = tmp_path / "rows.jsonl", [tmp_path / "a.png", tmp_path / "a.svg"]
    arguments = ["--rows", "33", "64", "--width", "32", "--json", str(file), *SMALL]
    code = bench_similarity.main([*arguments, "--objective", "InfoNCE", "CLIP-KD"])
    rows = rows_of(file)
    assert code == 0
    assert {"torch", "eager", "oracle"} <= {row["backend"] for row in rows}
    for row in rows:
        assert row["forward_backward"]["median_ms"] > 0 and row["peak_mib"] > 0
        assert 0 < row["errors"]["image"] < 1e-4 and row["share_minimum"] > 0
        assert row["truth"] == "float64 oracle" and row["commit"] and row["device"]
        product_ms = row["share_minimum"] * row["forward_backward"]["median_ms"]
        assert product_ms == pytest.approx(row["minimum_units"] * row["unit_ms"])
    for picture in pictures:
        plot.main([str(file), "--out", str(picture), "--width", "32"])
        assert picture.stat().st_size > 5000


@pytest.mark.parametrize("bench", ["similarity", "feature"])
def test_a_wrong_kernel_gets_no_time(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = {"similarity": similarity_torch, "feature": feature_torch}[bench]
    right = module.backward

    def wrong(*arguments: Any) -> Any:
        first, *others = right(*arguments)
        return [1.01 * first, *others]

    monkeypatch.setattr(module, "backward", wrong)
    main = {"similarity": bench_similarity.main, "feature": bench_feature.main}[bench]
    cases = ["--case", "feature", "towers"] if bench == "feature" else []
    file = tmp_path / "rows.jsonl"
    code = main(["--rows", "48", "--width", "32", *cases, "--json", str(file), *SMALL])
    ours = [row for row in rows_of(file) if row["backend"] == "torch"]
    others = [row for row in rows_of(file) if row["backend"] == "eager"]
    assert code == race.WRONG
    assert ours and all("wrong" in row["reason"] for row in ours)
    assert not any("forward_backward" in row for row in ours)
    assert others and all("forward_backward" in row for row in others)
    assert "no time for torch: wrong" in capsys.readouterr().out


def test_a_wrong_assignment_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--rows", "64", "--keys", "128", "--width", "16", *SMALL]
    right = tmp_path / "right.jsonl"
    assert bench_assign.main([*arguments, "--json", str(right)]) == 0
    rows = rows_of(right)
    assert {row["case"] for row in rows} == set(bench_assign.CASES)
    assert {row["backend"] for row in rows} == {"torch", "eager", "faiss"}
    assert all(row["time"]["median_ms"] > 0 and row["agreement"] > 0.9 for row in rows)
    monkeypatch.setattr(
        bench_assign.ops,
        "assign",
        lambda x, key, count, backend: ops.Assignment(
            torch.zeros(len(x), count, dtype=torch.int64), torch.zeros(len(x), count)
        ),
    )
    wrong = tmp_path / "wrong.jsonl"
    assert bench_assign.main([*arguments, "--json", str(wrong)]) == race.WRONG
    ours = [row for row in rows_of(wrong) if row["backend"] == "torch"]
    assert ["time" in row for row in ours] == [False, False, True]
    assert "no time for torch, nearest: wrong" in capsys.readouterr().out


def test_a_peer_that_raises_costs_its_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: Any, x: Any) -> Any:
        raise RuntimeError("no such architecture\nand a long tail")

    peer = bench_similarity.peers.Peer("broken", (), ("InfoNCE",), broken, (5,))
    monkeypatch.setattr(bench_similarity.peers, "open_clip_peers", lambda compiled: [peer])
    file = tmp_path / "rows.jsonl"
    arguments = ["--rows", "32", "--width", "16", "--objective", "InfoNCE", *SMALL]
    assert bench_similarity.main([*arguments, "--json", str(file)]) == 0
    rows = {row["backend"]: row for row in rows_of(file)}
    assert rows["broken"]["reason"] == "RuntimeError: no such architecture"
    assert rows["torch"]["forward_backward"]["median_ms"] > 0


def test_not_a_number_is_wrong() -> None:
    assert race.why_wrong({"image": float("nan")}, False, torch.bfloat16)
    assert race.why_wrong({"image": 0.09}, False, torch.bfloat16) is None
    assert race.why_wrong({"image": 0.09}, True, torch.bfloat16)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("rows", [256, 2048])
def test_pairs_have_about_half_of_their_softmax(scale: float, rows: int) -> None:
    problem = problems.Problem("InfoNCE", rows, 512, scale=scale, dtype=torch.float32)
    x = problems.make_inputs(problem, torch.device("cpu"))
    logits = scale * x["image"].detach() @ x["text"].detach().T
    assert 0.3 < logits.softmax(1).diagonal().mean() < 0.7


def test_the_dense_loss_is_the_oracles() -> None:
    for name, objective in problems.OBJECTIVES.items():
        problem = problems.Problem(name, 48, 32, dtype=torch.float32)
        x = problems.make_inputs(problem, torch.device("cpu"))
        truth = problems.make_truth(problem, x)
        assert problems.dense_loss(x, objective).item() == pytest.approx(
            truth.loss.item(), rel=1e-5
        )


def test_a_crash_is_noted_and_what_follows_still_runs(tmp_path: Path, repository: Path) -> None:
    script, file = tmp_path / "part.py", tmp_path / "rows.jsonl"
    script.write_text(
        "import os, sys\n"
        "from benchmarks.common import Journal\n"
        f"journal = Journal({str(file)!r}, resume='--resume' in sys.argv)\n"
        "for case in range(3):\n"
        "    identity = {'case': case}\n"
        "    if not journal.has(identity):\n"
        "        journal.start(identity)\n"
        "        if case == 1:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        journal.add(identity, fine=True)\n"
    )
    part = run_all.Part("part", [str(script)], 60, 0, True)
    with open(tmp_path / "log.txt", "w") as log:
        end = run_all.time.monotonic() + 60
        right, words = run_all.run_part(part, end, run_all.Console(log))
    assert right and words.startswith("part: done")
    rows = rows_of(file)
    assert [row["case"] for row in rows] == [0, 1, 2]
    assert "crashed or hung" in rows[1]["reason"] and rows[2]["fine"]


@pytest.mark.parametrize(
    ("seconds", "silence", "reason"), [(1.0, 60.0, "time is up"), (60.0, 1.0, "silent for 1 s")]
)
def test_a_part_that_hangs_is_ended(
    seconds: float, silence: float, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_all, "SILENCE_S", silence)
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(30)"]
        start = run_all.time.monotonic()
        code = run_all.run(command, seconds, run_all.Console(log))
    assert code is None and run_all.time.monotonic() - start < 20
    told = (tmp_path / "log.txt").read_text()
    assert "on\n" in told and reason in told


def test_the_plan_of_a_gpu_has_no_problem_twice_and_each_kind_runs(tmp_path: Path) -> None:
    plan = problems.gpu_plan()
    keys = [json.dumps(problem.identity) for problem in plan]
    assert len(keys) == len(set(keys)) > 20
    options = bench_similarity.parse(SMALL)
    device, journal = torch.device("cpu"), common.Journal(tmp_path / "rows.jsonl")
    kinds = {(p.objective, p.field, p.dtype, p.teacher_width): p for p in plan}
    for problem in kinds.values():
        wide = problem.teacher_width and 24
        small = problem._replace(rows=16, width=32, teacher_width=wide, compiled=False)
        assert bench_similarity.run_problem(small, options, device, journal)


def test_both_variants_of_strips_can_be_timed() -> None:
    chosen, seen = kernels.two_phase, []

    def loss() -> torch.Tensor:
        seen.append(kernels.two_phase(512, [512], 2, True))
        return torch.ones((), requires_grad=True)

    for variant in ("G1", "G2"):
        using = functools.partial(bench_similarity.strips_by, variant)
        contender = race.Contender(variant, loss, {}, using=using)
        with pytest.raises(ValueError, match="grad requires non-empty inputs"):
            contender.step()
    assert seen == [False, True] and kernels.two_phase is chosen


def test_faster_variants_are_timed_more_often() -> None:
    calls = {"slow": 0, "fast": 0}

    def run(name: str, size: int) -> None:
        calls[name] += 1
        torch.ones(size).sum()

    variants = {n: (lambda n=n, s=s: run(n, s)) for n, s in (("slow", 4_000_000), ("fast", 8))}
    spreads = common.time_interleaved(variants, torch.device("cpu"), 0.1)
    assert calls["fast"] > 2 * calls["slow"] >= 10
    assert spreads["fast"].p20_ms <= spreads["fast"].median_ms <= spreads["fast"].p80_ms


def test_parts_leave_time_to_those_behind_them(tmp_path: Path) -> None:
    found = {part.name: part for part in run_all.parts_of(run_all.PARTS, tmp_path)}
    assert list(found) == list(run_all.PARTS)
    assert found["step"].reserve_s == 0 and found["data"].reserve_s == run_all.KEPT_S["step"]
    assert found["smoke"].reserve_s == sum(run_all.KEPT_S.values())
    (alone,) = run_all.parts_of(["similarity"], tmp_path)
    assert alone.reserve_s == 0
