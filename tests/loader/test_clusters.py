# SPDX-License-Identifier: Apache-2.0
"""Clusters in batches: those of the samples, whatever training reads and wherever it goes on."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdengine.data import ClusterRows, ViewSpec, build_loader, ensure_index
from kdengine.demo.shards import Sizes, render_data

K, TOP = 11, 4
NUMBERS = torch.arange(48)
LABELS = (7 * NUMBERS) % K
EXPECTED = {
    "cluster": LABELS,
    "cluster_nearest": (LABELS[:, None] + torch.arange(TOP)) % K,
    "cluster_cosine": NUMBERS[:, None] / 64 - torch.arange(TOP) / 8,
    "cluster_lse": 100 - NUMBERS / 4,
}
FILES = ("labels", "nearest", "cosines", "lse")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three shards of 16 rendered scenes."""
    folder = tmp_path_factory.mktemp("clusters") / "data"
    render_data(folder, 0, Sizes(num_shards=3, shard_size=16, num_val=4, num_per_class=1))
    shards = sorted(str(path) for path in folder.glob("*train*.tar"))
    return ensure_index(shards, tokenizers=["simple:77"])


def write(folder: Path, index: Any, **told: Any) -> Path:
    """What the command writes of the shards of an index, with numbers that tell the sample."""
    for shard in index.shards:
        place = folder / "shards" / shard.label
        place.mkdir(parents=True)
        for file, values in zip(FILES, EXPECTED.values(), strict=True):
            part = values[shard.first : shard.first + shard.num_samples]
            dtype = torch.float32 if part.is_floating_point() else torch.int32
            np.save(place / f"{file}.npy", part.to(dtype).numpy())
    values = {"command": "cluster", "k": K, "width": 8, "top": TOP, "scale": 50.0, "digest": "a"}
    (folder / "manifest.json").write_text(json.dumps(values | told))
    return folder


def attached(folder: Path, index: Any, with_targets: bool = True) -> ClusterRows:
    clusters = ClusterRows(folder, with_targets=with_targets)
    clusters.check(index)
    clusters.attach(index)
    return clusters


def load(index: Any, **options: Any) -> Any:
    views = {"image": ViewSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    given = {"batch_size": 4, "num_threads": 1, "shuffle_buffer": 9, "seed": 3} | options
    return build_loader(index, views=views, tokenizers={"tokens": "simple:77"}, **given)


def assert_belong(batches: list[Any], with_targets: bool = True) -> None:
    for batch in batches:
        for name in list(EXPECTED)[: 4 if with_targets else 1]:
            expected = EXPECTED[name][batch["sample"] % 48]
            assert batch[name].dtype == expected.dtype and torch.equal(batch[name], expected)
        assert ("cluster_lse" in batch) == with_targets


class Replay:
    """Two stored views of every sample, the whole image."""

    num_views, digest = 2, "stored"

    def check(self, index: Any) -> None: ...

    def attach(self, index: Any) -> None: ...

    def windows(self, numbers: np.ndarray, views: np.ndarray) -> np.ndarray:
        return np.tile(np.array([0, 0, 16, 16]), (len(numbers), 1))

    def rows(self, numbers: np.ndarray, *_: Any) -> dict[str, torch.Tensor]:
        return {"cached": torch.from_numpy(numbers)}


@pytest.mark.parametrize("with_targets", [True, False], ids=["targets", "labels"])
@pytest.mark.parametrize("replay", [None, Replay()], ids=["drawn", "stored"])
def test_rows_of_a_batch_are_those_of_its_samples(
    replay: Any, with_targets: bool, index: Any, tmp_path: Path
) -> None:
    clusters = attached(write(tmp_path / "out", index), index, with_targets)
    facts = (clusters.num_clusters, clusters.top, clusters.scale, clusters.width, clusters.digest)
    assert facts == (K, TOP if with_targets else 0, 50.0, 8, "a")
    options = {"clusters": clusters, "replay": replay}
    loaders = [load(index, rank=rank, world_size=2, **options) for rank in (0, 1)]
    batches = [batch for loader in loaders for batch in islice(loader, 6)]
    assert_belong(batches, with_targets)
    assert set(torch.cat([batch["sample"] for batch in batches]).tolist()) == set(range(48))
    plain = load(index, rank=1, world_size=2, replay=replay)
    for own, other in zip(batches[6:], islice(plain, 6), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)
    # where it goes on
    resumed = load(index, rank=1, world_size=2, **options)
    state = loaders[1].state_dict()
    resumed.load_state_dict(state)
    again = list(islice(resumed, 5))
    assert_belong(again, with_targets)
    for own, other in zip(again, islice(loaders[1], 5), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)


def test_rows_stay_those_of_the_samples_under_a_keep_list(index: Any, tmp_path: Path) -> None:
    keep = np.arange(48) % 3 == 1
    for shard in index.shards:
        place = tmp_path / "keep" / "shards" / shard.label
        place.mkdir(parents=True)
        np.save(place / "keep.npy", keep[shard.first : shard.first + shard.num_samples])
    (tmp_path / "keep" / "manifest.json").write_text("{}")
    part = index.keep(tmp_path / "keep")
    loader = load(part, clusters=attached(write(tmp_path / "out", index), part))
    batches = list(islice(loader, 4))
    assert_belong(batches)
    assert sorted(torch.cat([b["sample"] for b in batches]).tolist()) == keep.nonzero()[0].tolist()


def test_a_shard_listed_twice_has_the_rows_of_its_samples(index: Any, tmp_path: Path) -> None:
    tars = [shard.tar for shard in index.shards]
    twice = ensure_index([*tars, tars[1]], tokenizers=["simple:77"])
    clusters = attached(write(tmp_path / "out", index), twice)
    batches = list(islice(load(twice, clusters=clusters), 16))
    assert_belong(batches)
    counts = torch.bincount(torch.cat([batch["sample"] for batch in batches]))
    assert counts.tolist() == [1] * 16 + [2] * 16 + [1] * 16
    assert torch.equal(clusters.rows(np.array([60, 28]))["cluster"], LABELS[[28, 28]])


def test_a_place_in_the_data_belongs_to_its_clusters(index: Any, tmp_path: Path) -> None:
    loader = load(index, clusters=attached(write(tmp_path / "a", index), index))
    next(loader)
    other = attached(write(tmp_path / "b", index, digest="b"), index)
    with pytest.raises(ValueError, match="clusters was a, is b"):
        load(index, clusters=other).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="clusters was a, is None"):
        load(index).load_state_dict(loader.state_dict())


def test_names_of_clusters_are_taken(index: Any) -> None:
    with pytest.raises(ValueError, match=r"\['cluster_lse'\] stand for more than one tensor"):
        build_loader(index, views={"cluster_lse": None}, tokenizers={}, batch_size=4)


def test_clusters_that_do_not_fit_are_refused(index: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", index)
    place = folder / "shards" / index.shards[1].label

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            ClusterRows(folder, with_targets=True).check(index)

    cosines = np.load(place / "cosines.npy")
    np.save(place / "cosines.npy", cosines[:, :3])
    refused(ValueError, r"expected float32 \[16, 4\] for 16 samples in .*, got float32 \[16, 3\]")
    ClusterRows(folder, with_targets=False).check(index)
    np.save(place / "cosines.npy", cosines)
    labels = np.load(place / "labels.npy")
    np.save(place / "labels.npy", labels[:15])
    refused(ValueError, r"expected int32 \[16\] for 16 samples in .*labels.npy, got int32 \[15\]")
    for wrong in (-1, K):
        labels[3] = wrong
        np.save(place / "labels.npy", labels)
        refused(ValueError, "expected labels from 0 to 10 in .*labels.npy, got .*; make it anew")
    (place / "labels.npy").write_bytes(b"")
    refused(ValueError, "labels.npy is no array: .*; make it anew")
    (place / "labels.npy").unlink()
    refused(FileNotFoundError, "has no clusters for 1 of 3 shards.*Run 'kdengine cache' and 'kden")


def test_a_folder_that_is_no_finished_clustering_is_refused(index: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", index, top=0)
    manifest = folder / "manifest.json"

    def refused(error: type[Exception], message: str, where: Path = folder) -> None:
        with pytest.raises(error, match=message):
            ClusterRows(where, with_targets=True)

    refused(FileNotFoundError, "is no folder; expected what 'kden", tmp_path / "nowhere")
    refused(ValueError, "has labels alone, and the teacher's softmax is wanted; run 'kdengine clus")
    for other in ('{"command": "balance"}', "[]"):
        manifest.write_text(other)
        refused(ValueError, "is no result of 'kdengine cluster'")
    manifest.write_text('{"command": "cluster", "k": 3, "width": 8}')
    refused(ValueError, r"lacks \['digest', 'scale', 'top'\], it is of another version; make it an")
    manifest.write_text("{")
    refused(ValueError, "manifest.json cannot be read: .*; make it anew")
    manifest.unlink()
    refused(FileNotFoundError, "has no manifest.json: 'kdengine cluster' has not finished it")


def test_clusters_that_go_away_meanwhile_are_named(index: Any, tmp_path: Path) -> None:
    clusters = attached(write(tmp_path / "out", index), index)
    (tmp_path / "out" / "shards" / index.shards[0].label / "lse.npy").unlink()
    with pytest.raises(RuntimeError, match="lse.npy cannot be read: .* changed or removed meanwh"):
        clusters.rows(np.arange(4))
