# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the loader: right first, then timed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_data


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_words(scenes: Path, scratch: Path) -> list[str]:
    words = ["--data", str(scenes / "scenes-train-000.tar"), "--scratch", str(scratch)]
    words += ["--size", "48", "--batch", "16", "--cores", "1", "--repeats", "2"]
    return [*words, "--passes", "1", "--seconds", "0", "--json", str(scratch / "rows.jsonl")]


def test_both_loaders_give_the_same_pixels_and_are_timed(scenes: Path, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    words = data_words(scenes, tmp_path)
    assert bench_data.main(words) == 0
    rows = {row["backend"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert set(rows) == {"DALI", "PIL"}
    assert 0 < rows["DALI"]["errors"]["worst"] <= 0.5 and rows["DALI"]["errors"]["tokens"] == 0
    rates = {name: row["samples_per_second"] for name, row in rows.items()}
    assert rows["DALI"]["ratio"] == pytest.approx(rates["DALI"] / rates["PIL"])
    assert all(len(row["samples_per_second_each"]) == 2 for row in rows.values())
    assert os.sched_getaffinity(0) == before
    # a second run with --resume measures nothing again
    assert bench_data.main([*words, "--resume"]) == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 2


@pytest.mark.parametrize("wrong", ["pixels", "tokens"])
def test_a_loader_that_is_off_gets_no_time(
    wrong: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench_data.build_loader

    def off(*arguments: Any, **options: Any) -> Any:
        loader = right(*arguments, **options)
        following = loader._next

        def shifted() -> Any:
            batch = following()
            key = {"pixels": "image", "tokens": "tokens"}[wrong]
            batch[key] = batch[key].roll(1, -1)
            return batch

        loader._next = shifted
        return loader

    monkeypatch.setattr(bench_data, "build_loader", off)
    assert bench_data.main(data_words(scenes, tmp_path)) == bench_data.race.WRONG
    rows = {row["backend"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert "wrong" in rows["DALI"]["reason"] and "samples_per_second" not in rows["DALI"]
    assert rows["PIL"]["samples_per_second"] > 0


def test_more_cores_than_there_are_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench_data.parse(["--cores", "100000"])
    assert "--cores: expected 1 to" in capsys.readouterr().err
