# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means: faiss's objective, equal on any ranks and after any interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdengine import reference_assign as reference
from kdengine.cli import main
from kdengine.cluster import (
    Wanted,
    balance_command,
    cluster_command,
    kmeans,
    open_embeddings,
    targets,
)
from kdengine.data import ClusterRows, ensure_index
from kdengine.demo.shards import Sizes, render_data

TARGETS = ("nearest", "cosines", "lse")


def clustered(rows: int, clusters: int, width: int, spread: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    own = centers[torch.randint(clusters, (rows,), generator=generator)]
    noise = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    return F.normalize(own + spread * noise, dim=1)


def read(out: Path, name: str = "labels") -> np.ndarray:
    return np.load(out / f"{name}.npy")


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def outcome(out: Path) -> list[Any]:
    values = manifest(out)
    names = ["labels", "centroids", "sizes", *TARGETS[: 3 * (values["top"] > 0)]]
    return [values, *(read(out, name) for name in names)]


def assert_equal(first: list[Any], second: list[Any]) -> None:
    assert first[0] == second[0]
    for x, y in zip(first[1:], second[1:], strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("spread", [0.6, 3.0], ids=["clusters", "hardly any"])
def test_the_objective_is_that_of_faiss(spread: float, write_array: Any, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    rows, k = clustered(6000, 60, 32, spread), 60
    cluster_command(write_array(rows), tmp_path / "out", k=k, iterations=25, tolerance=0.0)
    theirs = []
    for seed in range(3):
        theirs_kmeans = faiss.Kmeans(
            32, k, niter=25, spherical=True, seed=seed, max_points_per_centroid=6000
        )
        theirs_kmeans.train(rows.numpy())
        centroids = torch.from_numpy(theirs_kmeans.centroids)
        theirs.append(float(reference.nearest(rows, centroids)[1].mean()))
    assert manifest(tmp_path / "out")["objective"] < 1.01 * np.mean(theirs)


def test_labels_are_the_nearest_centroids_and_the_objective_is_theirs(
    write_array: Any, tmp_path: Path
) -> None:
    rows = clustered(500, 12, 16)
    cluster_command(write_array(7 * rows), tmp_path / "out", k=12)
    told, labels, centroids, sizes, *_ = outcome(tmp_path / "out")
    index, squares = reference.nearest(rows.double(), torch.from_numpy(centroids).double())
    assert np.array_equal(labels, index[:, 0].numpy())
    assert np.array_equal(sizes, np.bincount(labels)) and sizes.sum() == 500
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    assert told["objective"] == pytest.approx(float(squares.mean()), rel=1e-5)
    objectives = [*told["objectives"], told["objective"]]
    assert len(objectives) > 3 and all(np.diff(objectives) <= 1e-9)


@pytest.mark.parametrize(("top", "scale"), [(5, 100.0), (64, 3.0)], ids=["some", "all"])
def test_targets_are_those_of_the_softmax_over_all_centroids(
    top: int, scale: float, write_array: Any, tmp_path: Path
) -> None:
    rows, out = clustered(500, 12, 16, 2.0), tmp_path / "out"
    cluster_command(write_array(rows), out, k=12, top=top, scale=scale)
    told, labels, centroids, _, nearest, cosines, lse = outcome(out)
    m = min(top, 12)
    assert (told["top"], told["scale"]) == (m, scale)
    assert [x.dtype for x in (nearest, cosines, lse)] == [np.int32, np.float32, np.float32]
    assert np.array_equal(nearest[:, 0], labels)
    x, key = rows.double(), torch.from_numpy(centroids).double()
    truth = reference.nearest_of_softmax(x, key, scale, m)
    assert np.array_equal(nearest, truth[0].numpy())
    # rounded once
    np.testing.assert_allclose(cosines, truth[1], rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(lse, truth[2], rtol=2e-7)
    q = np.exp(scale * cosines.astype(np.float64) - lse[:, None])
    dense = (scale * x @ key.mT).softmax(1)
    expected = dense.gather(1, truth[0]).numpy()
    np.testing.assert_allclose(q, expected, rtol=4e-7 * scale, atol=1e-9)
    np.testing.assert_allclose(1 - q.sum(1), 1 - expected.sum(1), atol=2e-5)


def test_a_targets_file_takes_eight_bytes_each_and_four(write_array: Any, tmp_path: Path) -> None:
    cluster_command(write_array(clustered(90, 70, 8, 2.0)), tmp_path / "out", k=70)
    m = manifest(tmp_path / "out")["top"]
    assert m == min(64, manifest(tmp_path / "out")["k"])
    header = 128
    size = sum((tmp_path / "out" / f"{name}.npy").stat().st_size - header for name in TARGETS)
    assert size == 90 * (8 * m + 4)
    cluster_command(tmp_path / "rows-0.npy", tmp_path / "none", k=70, top=0)
    assert manifest(tmp_path / "none")["top"] == 0
    left = {path.name for path in (tmp_path / "none").iterdir()}
    assert left == {".lock", "manifest.json", "labels.npy", "centroids.npy", "sizes.npy"}


def test_targets_go_on_after_an_interruption(
    write_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clustered(120, 9, 16, 2.0)[None]
    shards = {"a-1": rows[:, :50], "b-2": rows[:, 50:51], "c-3": rows[:, 51:]}
    cache, options = write_cache(tmp_path / "cache", shards), {"k": 9, "top": 4, "iterations": 3}
    cluster_command(cache, tmp_path / "whole", **options)
    monkeypatch.setattr(kmeans, "BLOCK_BYTES", 4 * (16 + 8 * 4) * 13)
    find, calls = targets.sparse_targets, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return find(*arguments)

    monkeypatch.setattr(targets, "sparse_targets", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster_command(cache, tmp_path / "parts", **options)
    place = tmp_path / "parts" / "shards"
    assert (place / "b-2" / "lse.npy").exists() and not (place / "c-3" / "lse.npy").exists()
    cluster_command(cache, tmp_path / "parts", **options)
    found = {}
    for out in ("whole", "parts"):
        files = sorted((tmp_path / out).rglob("*.npy"))
        found[out] = {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files}
    assert len(found["whole"]) == 2 + 3 * 4 and found["parts"] == found["whole"]


def test_an_interrupted_command_goes_on_to_the_same_bits(
    write_array: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = write_array(clustered(800, 20, 16, 2.0))
    options = {"k": 20, "iterations": 7, "tolerance": 0.0}
    cluster_command(path, tmp_path / "whole", **options)
    line = ["cluster", str(path), str(tmp_path / "parts"), "--k", "20", "--iterations", "7"]
    line += ["--tolerance", "0"]
    iterate, calls = kmeans.iterate, []

    def interrupted(*arguments: Any) -> None:
        calls.append(len(arguments[1].objectives))
        if calls.count(3) == 1 and calls[-1] == 3 or calls[-1] == 5 and calls.count(5) == 1:
            raise KeyboardInterrupt
        iterate(*arguments)

    monkeypatch.setattr(kmeans, "iterate", interrupted)
    for _ in range(2):
        assert main(line) == 130
        told = capsys.readouterr().err
        assert told.startswith("interrupted; ") and told.endswith("goes on from there\n")
    cluster_command(path, tmp_path / "parts", **options)
    assert calls == [0, 1, 2, 3, 3, 4, 5, 5, 6]
    assert_equal(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    assert not (tmp_path / "parts" / "state.pt").exists()
    # done is done
    cluster_command(path, tmp_path / "parts", **options)
    assert len(calls) == 9


def test_only_what_balance_keeps_makes_centroids(
    write_cache: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = clustered(150, 9, 16, 2.0)
    cache = write_cache(tmp_path / "cache", {"a-1": rows[None, :70], "b-2": rows[None, 70:]})
    balance_command(cache, tmp_path / "kept", Wanted(rule="random", retention=0.4))
    parts = [tmp_path / "kept" / "shards" / name / "keep.npy" for name in ("a-1", "b-2")]
    keep = np.concatenate([np.load(part) for part in parts])
    options = ["--k", "30", "--top", "3", "--keep", str(tmp_path / "kept")]
    assert main(["cluster", str(cache), str(tmp_path / "out"), *options]) == 0
    assert "150 rows, 60 of which stay" in capsys.readouterr().out
    places = [tmp_path / "out" / "shards" / name for name in ("a-1", "b-2")]
    labels = np.concatenate([read(place) for place in places])
    centroids = read(tmp_path / "out", "centroids")
    truth = reference.nearest(open_embeddings(cache).read(0, 150), torch.from_numpy(centroids), 3)
    assert np.array_equal(labels, truth[0][:, 0])
    assert np.array_equal(np.concatenate([read(p, "nearest") for p in places]), truth[0])
    assert set(labels[keep]) == set(range(len(centroids)))
    # the same as of those rows alone
    told, own = manifest(tmp_path / "out"), tmp_path / "own.npy"
    np.save(own, rows[keep].numpy())
    cluster_command(own, tmp_path / "alone", k=30)
    alone = manifest(tmp_path / "alone")
    np.testing.assert_allclose(told["objectives"], alone["objectives"], rtol=1e-6)
    np.testing.assert_allclose(centroids, read(tmp_path / "alone", "centroids"), atol=1e-6)
    assert told["num_kept"] == 60 and told["num_rows"] == 150 and told["asked"] != alone["asked"]
    # another folder to keep is told by its name
    balance_command(cache, tmp_path / "less", Wanted(rule="random", retention=0.3))
    few = {"k": 30, "top": 3}
    for keep_other, message in (
        (tmp_path / "less", r"another clustering: --keep [0-9a-f]{12}, not [0-9a-f]{12}; give"),
        (None, r"another clustering: --keep [0-9a-f]{12}, not none; give"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster_command(cache, tmp_path / "out", keep=keep_other, **few)
    with pytest.raises(ValueError, match="number of rows that stay, 60; got 61"):
        cluster_command(cache, tmp_path / "many", k=61, keep=tmp_path / "kept")
    with pytest.raises(ValueError, match="is another result or of others; run 'kdengine balance'"):
        cluster_command(own, tmp_path / "x", k=3, keep=tmp_path / "kept")


def test_every_cluster_has_a_row_that_stays(write_array: Any, tmp_path: Path) -> None:
    # what stays is alike, so that halves of its clusters attract what does not
    path = write_array(torch.cat([clustered(1, 1, 8).repeat(40, 1), clustered(60, 6, 8, 2.0)]))
    balance_command(path, tmp_path / "kept", Wanted(rule="random"))
    keep = np.arange(100) < 43
    np.save(tmp_path / "kept" / "keep.npy", keep)
    cluster_command(path, tmp_path / "out", k=12, keep=tmp_path / "kept")
    told, labels, centroids, sizes, nearest, *_ = outcome(tmp_path / "out")
    assert set(labels[keep]) == set(range(told["k"])) and len(centroids) == told["k"] < 12
    assert np.array_equal(sizes, np.bincount(labels)) and np.array_equal(nearest[:, 0], labels)


def on_ranks(rank: int, world_size: int, path: str, out: str) -> None:
    kmeans.BLOCK_BYTES = 4 * 16 * 37
    cluster_command(path, f"{out}-{world_size}", k=20, iterations=5)


def test_ranks_and_blocks_change_no_bit(write_array: Any, run_ranks: Any, tmp_path: Path) -> None:
    path = write_array(clustered(500, 30, 16, 2.0))
    cluster_command(path, tmp_path / "one", k=20, iterations=5)
    for world_size in (1, 2):
        run_ranks(on_ranks, world_size, str(path), str(tmp_path / "out"))
        assert_equal(outcome(tmp_path / f"out-{world_size}"), outcome(tmp_path / "one"))


def test_empty_clusters_are_filled_from_large_ones(write_array: Any, tmp_path: Path) -> None:
    # all centroids but a few start at copies of one row
    many, few = clustered(1, 1, 8).repeat(400, 1), clustered(60, 6, 8)
    cluster_command(write_array(torch.cat([many, few])), tmp_path / "out", k=12, tolerance=0.0)
    told, labels, centroids, sizes, nearest, *_ = outcome(tmp_path / "out")
    assert np.array_equal(nearest[:, 0], labels)
    assert sum(told["num_split"]) > 0 and np.isfinite(centroids).all()
    assert len(sizes) == told["k"] == len(centroids) and sizes.min() > 0
    assert 2 < told["k"] <= 12 and set(labels) == set(range(told["k"]))


def test_half_of_the_largest_goes_to_an_empty_one() -> None:
    centroids = clustered(4, 4, 6)
    filled, count = kmeans.fill_empty(centroids.clone(), torch.tensor([9, 0, 9, 0]))
    assert count == 2
    for empty, donor in ((1, 0), (3, 2)):
        middle = F.normalize(filled[empty] + filled[donor], dim=0)
        torch.testing.assert_close(middle, centroids[donor], rtol=0, atol=1e-5)
        assert 0 < float((filled[empty] - filled[donor]).norm()) < 5e-3
    # two rows that are alike cannot be told apart
    same, count = kmeans.fill_empty(centroids.clone(), torch.tensor([1, 0, 1, 0]))
    assert count == 0 and torch.equal(same, centroids)


def test_training_reads_what_the_command_wrote(write_cache: Any, tmp_path: Path) -> None:
    render_data(tmp_path / "data", 0, Sizes(num_shards=2, shard_size=16, num_val=4))
    index = ensure_index(sorted(map(str, (tmp_path / "data").glob("*train*.tar"))))
    rows = clustered(32, 6, 16, 2.0)
    shards = {s.label: rows[None, s.first : s.first + s.num_samples] for s in index.shards}
    cache, out = write_cache(tmp_path / "cache", shards), tmp_path / "out"
    cluster_command(cache, out, k=6, top=3, scale=20.0)
    clusters = ClusterRows(out, with_targets=True)
    assert (clusters.num_clusters, clusters.top, clusters.scale, clusters.width) == (6, 3, 20.0, 16)
    clusters.check(index)
    clusters.attach(index)
    numbers = np.array([31, 4, 15, 16, 4])
    found = clusters.rows(numbers)
    key = torch.from_numpy(read(out, "centroids")).double()
    truth = reference.nearest_of_softmax(rows[numbers].double(), key, 20.0, 3)
    assert torch.equal(found["cluster"], truth[0][:, 0])
    assert torch.equal(found["cluster_nearest"], truth[0])
    torch.testing.assert_close(found["cluster_cosine"].double(), truth[1], rtol=0, atol=3e-7)
    torch.testing.assert_close(found["cluster_lse"].double(), truth[2], rtol=1e-6, atol=0)
    cluster_command(cache, tmp_path / "other", k=6, top=3, scale=21.0)
    assert clusters.digest != ClusterRows(tmp_path / "other", with_targets=True).digest
    cluster_command(cache, tmp_path / "labels", k=6, top=0)
    ClusterRows(tmp_path / "labels", with_targets=False).check(index)
    with pytest.raises(ValueError, match="has labels alone, and the teacher's softmax is wanted"):
        ClusterRows(tmp_path / "labels", with_targets=True)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_labels_lie_beside_the_shards_of_a_cache(
    storage: str, write_cache: Any, tmp_path: Path
) -> None:
    views = torch.stack([clustered(90, 5, 16), clustered(90, 5, 16)])
    views[1] += 0.1 * torch.randn(90, 16)
    # made in another order than that of their names
    shards = {"b.tar-22": views[:, 50:], "a.tar-11": views[:, :50]}
    cache = write_cache(tmp_path / "cache", shards, storage)
    rows = F.normalize(F.normalize(views, dim=2).mean(0), dim=1)
    embeddings = open_embeddings(cache)
    tolerance = {"fp32": 1e-6, "bf16": 4e-3, "int8": 2e-2}[storage]
    torch.testing.assert_close(embeddings.read(0, 90), rows, rtol=0, atol=tolerance)
    order = np.array([70, 3, 49, 50, 3, 89])
    assert torch.equal(embeddings.take(order), embeddings.read(0, 90)[order])
    assert torch.equal(embeddings.read(45, 60), embeddings.read(0, 90)[45:60])
    cluster_command(cache, tmp_path / "out", k=5)
    centroids = torch.from_numpy(read(tmp_path / "out", "centroids"))
    index = reference.nearest(embeddings.read(0, 90), centroids)[0][:, 0].numpy()
    for name, part in (("a.tar-11", slice(0, 50)), ("b.tar-22", slice(50, 90))):
        labels = read(tmp_path / "out" / "shards" / name)
        assert labels.dtype == np.int32 and np.array_equal(labels, index[part])


def test_what_cannot_be_is_refused(write_array: Any, write_cache: Any, tmp_path: Path) -> None:
    path, out = write_array(clustered(40, 4, 8)), tmp_path / "out"
    cluster_command(path, out, k=4)
    with pytest.raises(ValueError, match="holds another clustering: --k 4, not 5; give the"):
        cluster_command(path, out, k=5)
    with pytest.raises(ValueError, match="clustering: --top 64, not 9; --scale 100.0, not 8"):
        cluster_command(path, out, k=4, top=9, scale=8.0)
    with pytest.raises(ValueError, match="--k is between 1 and the number of rows, 40; got 41"):
        cluster_command(path, tmp_path / "more", k=41)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no result of 'kdengine cluster'"):
        cluster_command(path, tmp_path / "other", k=2)
    broken = clustered(40, 4, 8)
    broken[3] = 0
    with pytest.raises(ValueError, match="the array holds rows that are not finite or have length"):
        cluster_command(write_array(broken), tmp_path / "broken", k=2)
    np.save(tmp_path / "flat.npy", np.zeros(5))
    with pytest.raises(ValueError, match="expected rows of floating point numbers"):
        open_embeddings(tmp_path / "flat.npy")
    (tmp_path / "text.npy").write_text("rows")
    with pytest.raises(ValueError, match="is no NumPy array"):
        open_embeddings(tmp_path / "text.npy")
    cache = write_cache(tmp_path / "cache", {"a.tar-11": clustered(9, 3, 8)[None]})
    with pytest.raises(ValueError, match="teacher 1 came, and .* holds 1"):
        open_embeddings(cache, 1)
    (cache / "shards" / "a.tar-11" / "view-0" / "teacher-0.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="lacks view-0, so the cache is not finished"):
        open_embeddings(cache)


def test_the_command_tells_what_it_found(
    write_array: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = str(write_array(clustered(300, 9, 8)))
    assert main(["cluster", path, str(tmp_path / "out"), "--k", "9"]) == 0
    told = capsys.readouterr().out
    assert "9 of 300 rows" in told and "mean squared distance" in told
    assert "9 nearest, softmax of scale 100" in told
    count = len(manifest(tmp_path / "out")["objectives"])
    assert count < 20 and f"{count}, converged, the last" in told
    assert main(["cluster", path, str(tmp_path / "short"), "--k", "9", "--iterations", "2"]) == 0
    assert "2, the limit, not converged; 0 empty" in capsys.readouterr().out
    out = str(tmp_path / "x")
    at_least = "cluster: --k and --iterations must be at least 1, --tolerance at least 0; got "
    for words, message in (
        ([path, out, "--k", "0"], f"{at_least}0, 20 and 0.0001"),
        ([path, out, "--k", "2", "--top", "-1"], "cluster: --top must be at least 0 and"),
        ([path, out, "--k", "2", "--scale", "0"], "cluster: --top must be at least 0 and"),
        ([str(tmp_path / "nowhere"), out, "--k", "2"], "embeddings: "),
    ):
        assert main(["cluster", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
