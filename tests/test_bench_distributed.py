# SPDX-License-Identifier: Apache-2.0
"""The benchmark of ranks counts what travels, misses no target in silence, and models by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_distributed, distributed_model, race
from benchmarks.distributed_model import Case, Link

B, D = 384, 16


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_ranks_are_counted_and_a_missed_target_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_distributed, "AGREES", {"float32": 1e-5})
    monkeypatch.setattr(bench_distributed, "TARGET_RANKS", 2)
    targets = {"InfoNCE": {"flops": 0.67}, "InfoNCE+CRD": {"bytes": 0.5}, "CLIP-KD": {}}
    targets["GD"] = {"flops": 0.51}
    monkeypatch.setattr(bench_distributed, "TARGETS", targets)
    file = tmp_path / "rows.jsonl"
    words = ["--cases", "count", "--sizes", "2", "--counted", str(B), str(D), "--json", str(file)]
    assert bench_distributed.main(words) == race.WRONG
    ours, theirs, ours_soft, theirs_soft, once, apart, spread, whole = rows_of(file)
    assert [row["units"] for row in (ours, theirs, ours_soft, theirs_soft)] == [4, 6, 6, 8]
    features = B * D * 4
    assert theirs["bytes"] == 4 * features and theirs_soft["bytes"] == 6 * features
    # eight sizes; log-sum-exp, positive and mean of each column, and with a teacher four more
    for row, out, numbers in ((ours, 1, 3), (ours_soft, 2, 7)):
        assert row["by_collective"] == {
            "all_gather_into_tensor": out * features + 8 * 8,
            "all_to_all_single": features + 2 * numbers * 4 * B,
        }
    assert [row["units"] for row in (once, apart, spread, whole)] == [10, 10, 18, 36]
    # texts of both and the teacher's images go out; the texts of the teacher once more for ICL
    assert apart["bytes"] - once["bytes"] == features
    # GD's texts out and gradients home of both, and of the student's in the backward
    numbers = 2 * (2 + 2) + 2 * 1
    assert spread["bytes"] == 6 * features + numbers * 4 * B + 5 * 8
    assert all("reason" not in row for row in (once, spread))
    assert "reason" not in ours and ours_soft["reason"] == "a target is missed"


def test_a_share_is_emulated_and_the_model_stands_on_it(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "model.svg"
    words = ["--cases", "emulation", "model", "--rows", "16", "--width", "8"]
    words += ["--emulated", "8", "64", "512"]
    words += ["--chunks", "0", "2", "--seconds", "0.02", "--total", "4096"]
    assert bench_distributed.main([*words, "--json", str(file), "--plot", str(picture)]) == 0
    rows = rows_of(file)
    emulated = [row for row in rows if row["case"] == "emulation"]
    # two objectives, three numbers of ranks, two of chunks
    assert len(emulated) == 12 and all(row["emulation"] and row["loss_ms"] > 0 for row in emulated)
    modelled = [row for row in rows if row["case"] == "model"]
    assert {row["size"] for row in modelled} == {2**k for k in range(3, 13)}
    assert all(row["rows"] * row["size"] == 4096 and row["assumptions"] for row in modelled)
    assert picture.stat().st_size > 5000
    picture.unlink()
    distributed_model.main([str(file), "--out", str(picture), "--rows", "4096"])
    assert picture.stat().st_size > 5000


def test_the_model_by_hand() -> None:
    """Four chunks of a rank of 5: blocks of 0.2 of the work each; a unit takes 1 s."""
    case = Case("InfoNCE+CRD", 5, 65536, 512, 2)
    rate = 2 * 65536**2 * 5 * 512
    assert distributed_model.num_chunks(case) == 4
    free = Link(float("inf"), float("inf"), 0.0)
    assert distributed_model.ours_s(case, rate, free) == pytest.approx((6.0, 0.0))
    assert distributed_model.open_clip_s(case, rate, free) == pytest.approx((8.0, 0.0))
    # a chunk of student and teacher takes 1 s, one of gradients 0.5 s: forward 1, 2, 3, 4 + 0.4;
    # backward 0.8 s a block, the last gradient leaves at 3.2 s, the own block ends at 4
    chunk_bytes = 4 * 65536 * 512 * 2 * 2 / 4
    slow = Link(chunk_bytes, float("inf"), 0.0)
    assert distributed_model.ours_s(case, rate, slow) == pytest.approx((4.4 + 4.0, 2.4))
    # over two nodes of eight: 7 + 7 pieces at the bandwidth of a link, one at an adapter's
    two_nodes = Case("InfoNCE", 16, 5, 512, 2)
    piece = 5 * 512 * 2
    found = distributed_model.home_s(two_nodes, piece, Link(14 * piece, piece / 2, 0.1))
    assert found == pytest.approx(1 + 2 + 0.1 * (7 + 1))
    # six gathers and reduce-scatters of 2 s
    assert distributed_model.open_clip_s(case, rate, slow) == pytest.approx((8.0 + 12.0, 12.0))
