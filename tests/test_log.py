# SPDX-License-Identifier: Apache-2.0
"""Records, progress line and console of a run."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from kdengine import log
from kdengine.log import Meter, RunLog

STEP = {
    "step": 10,
    "loss": 2.5,
    "loss/task": 2.0,
    "loss/crd": 0.5,
    "scale": 14.3,
    "lr": 1e-3,
    "samples_per_second": 512.0,
    "data_wait_pct": 1.25,
    "step_time_ms": 500.0,
    "num_skipped": 0,
}


def run_log(
    folder: Path, *, terminal: bool = False, **options: object
) -> tuple[RunLog, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200, highlight=False)
    options = {"total": 100, "tensorboard": False, "console": console} | options
    return RunLog(folder, **options), screen


def test_progress_line_says_all() -> None:
    line = log.progress_line(STEP, 100)
    assert line == (
        "step 10/100  loss 2.5000  task 2.0000  crd 0.5000  scale 14.30  lr 1.00e-03  "
        "512 samples/s  data 1.2%  eta 00:00:45"
    )


def test_progress_line_counts_skipped_steps() -> None:
    assert log.progress_line(STEP | {"num_skipped": 3}, 100).endswith("skipped 3")


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.9, "00:00:59"), (93784, "1d 02:03:04"), (math.inf, "--:--:--")]
)
def test_duration(seconds, text) -> None:
    assert log.duration(seconds) == text


def test_step_goes_to_file_console_and_text(tmp_path: Path) -> None:
    run, screen = run_log(tmp_path)
    run.step(STEP)
    run.close()
    assert log.read(tmp_path / "metrics.jsonl") == [STEP]
    assert "step 10/100  loss 2.5000" in screen.getvalue()
    assert "step 10/100  loss 2.5000" in (tmp_path / "out.log").read_text()


def test_terminal_gets_one_moving_line(tmp_path: Path) -> None:
    run, screen = run_log(tmp_path, terminal=True)
    run.step(STEP)
    run.step(STEP | {"step": 20})
    run.close()
    assert "step 20/100" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_evaluation_is_read_in_percent_and_kept_in_fractions(tmp_path: Path) -> None:
    run, screen = run_log(tmp_path)
    results = {"set/zeroshot-top1": 0.4567, "set/image_to_text_mean_rank": 3.25}
    run.evaluation(7, results, 2.0)
    run.close()
    assert log.read(tmp_path / "eval.jsonl") == [{"step": 7, **results}]
    for text in (screen.getvalue(), (tmp_path / "out.log").read_text()):
        assert "45.7 %" in text and "0.4567" not in text
        assert "3.2" in text and "325" not in text


def test_table_has_a_row_for_each_metric_of_a_set() -> None:
    table = log.metrics_table({"a/1caption/image_to_text_R@1": 0.5, "a/x_mean_rank": 3.25}, "t")
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["a", "a"], ["1caption/image_to_text_R@1", "x_mean_rank"], ["50.0 %", "3.2"]]


def test_counts_and_strengths_are_no_shares() -> None:
    names = {"r/zeroshot-classes": 200.0, "c/probe-C": 31.6, "c/probe-top1": 0.5}
    table = log.metrics_table(names, "t")
    assert list(table.columns[2].cells) == ["200", "31.6", "50.0 %"]


def test_one_line_under_the_table_says_what_1caption_means() -> None:
    names = ("a/image_to_text_median_rank", "a/1caption/image_to_text_median_rank")
    screen = io.StringIO()
    Console(file=screen, width=80).print(log.metrics_table(dict.fromkeys(names, 1.0), "t"))
    last = screen.getvalue().rstrip().splitlines()[-1]
    assert last.strip() == "1caption: with the first caption of each image only"
    assert log.metrics_table({names[0]: 1.0}, "t").caption is None


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run, screen = run_log(tmp_path / "run", enabled=False)
    run.step(STEP)
    run.warn("careful")
    run.header("title", {"a": "b"})
    run.evaluation(1, {"set/top1": 0.5}, 1.0)
    run.close()
    assert not (tmp_path / "run").exists()
    assert screen.getvalue() == ""


def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    log.append(tmp_path / "x.jsonl", {"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_resume_removes_records_of_later_steps(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        log.append(tmp_path / "metrics.jsonl", {"step": step})
        log.append(tmp_path / "eval.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4')  # the run was killed in the middle of a line
    run, _ = run_log(tmp_path, step=20)
    run.step(STEP | {"step": 30})
    run.close()
    assert [r["step"] for r in log.read(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    assert [r["step"] for r in log.read(tmp_path / "eval.jsonl")] == [10, 20]


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    run, _ = run_log(tmp_path, tensorboard=True)
    run.step(STEP)
    run.evaluation(10, {"set/top1": 0.5}, 1.0)
    run.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/loss")[0].value == 2.5
    assert board.Scalars("eval/set/top1")[0].step == 10


def test_meter_leaves_out_what_is_not_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    meter = Meter()
    for _ in range(4):
        now[0] += 0.5
        meter.add(data_wait_s=0.1)
    now[0] += 60
    meter.leave_out(60)
    rates = meter.rates(samples_per_step=8)
    assert rates["samples_per_second"] == pytest.approx(16)
    assert rates["step_time_ms"] == pytest.approx(500)
    assert rates["data_wait_pct"] == pytest.approx(20)
    now[0] += 1
    meter.add(data_wait_s=0)
    assert meter.rates(samples_per_step=8)["samples_per_second"] == pytest.approx(8)
