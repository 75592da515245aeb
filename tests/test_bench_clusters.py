# SPDX-License-Identifier: Apache-2.0
"""k-means is timed beside faiss if it is as good; planted copies are balanced away."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import balance_million, race
from benchmarks.balance_million import COPY_RADIUS, plant


def test_k_means_that_is_worse_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("faiss")
    from benchmarks import bench_kmeans

    words = "--rows 600 --width 16 --k 12 --iterations 3 --threads 1 --seconds 0.01".split()
    words += ["--clock", "processor"]
    file = tmp_path / "rows.jsonl"
    assert bench_kmeans.main([*words, "--json", str(file)]) == 0
    rows = {row["backend"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == {"torch", "faiss"}
    assert all(
        row["time"]["median_ms"] > 0 and row["clock"] == "processor" for row in rows.values()
    )
    assert rows["torch"]["objective_vs_faiss"] <= 1.01
    monkeypatch.setattr(bench_kmeans, "ours", lambda *_: torch.eye(16)[:12])
    other = tmp_path / "other.jsonl"
    assert bench_kmeans.main([*words, "--json", str(other)]) == race.WRONG
    assert "no time" in capsys.readouterr().out and not other.exists()


def test_copies_lie_near_their_original_and_go(tmp_path: Path) -> None:
    originals = plant(tmp_path / "rows.npy", 3000, 64, 0)
    rows = np.load(tmp_path / "rows.npy")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    own = np.flatnonzero(originals == np.bincount(originals).argmax())
    distances = np.linalg.norm(rows[own, None] - rows[None, own], axis=2)
    assert len(own) > 3 and distances.max() < 2 * COPY_RADIUS[1]
    file = tmp_path / "row.jsonl"
    words = ["--rows", "3000", "--width", "64", "--cells", "3", "--json", str(file)]
    assert balance_million.main(words) == 0
    row = json.loads(file.read_text())
    assert row["num_kept"] == round(0.563 * 3000) and row["cells"] == 3
    assert row["own_stand"] == 1.0 and row["recall_of_pairs"] > 0.9
    assert row["peak_rss_mib"] > row["anonymous_mib"] > 0
