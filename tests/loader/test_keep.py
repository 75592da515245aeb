# SPDX-License-Identifier: Apache-2.0
"""Keep lists: training reads what they keep, under the numbers of the whole data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdengine.data import ViewSpec, build_loader, ensure_index
from kdengine.demo.shards import Sizes, render_data


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 16 rendered scenes."""
    folder = tmp_path_factory.mktemp("keep") / "data"
    render_data(folder, 0, Sizes(num_shards=3, shard_size=16, num_val=4, num_per_class=1))
    return "::".join(sorted(str(path) for path in folder.glob("*train*.tar")))


def write(folder: Path, index: Any, keep: np.ndarray) -> Path:
    for shard in index.shards:
        place = folder / "shards" / shard.label
        place.mkdir(parents=True)
        np.save(place / "keep.npy", keep[shard.first : shard.first + shard.num_samples])
    (folder / "manifest.json").write_text("{}")
    return folder


def load(index: Any, **options: Any) -> Any:
    views = {"image": ViewSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    given = {"batch_size": 4, "num_threads": 1} | options
    return build_loader(index, views=views, tokenizers={"tokens": "simple:77"}, **given)


def passes(loader: Any, num: int) -> list[list[int]]:
    found = []
    for _ in range(num):
        found.append([])
        for _ in range(loader.steps_per_epoch):
            found[-1] += next(loader)["sample"].tolist()
    loader.close()
    return found


def test_training_reads_what_is_kept(shards: str, tmp_path: Path) -> None:
    index = ensure_index(shards, tokenizers=["simple:77"])
    keep = np.zeros(48, bool)
    # of the second shard nothing
    keep[[0, 3, 5, 6, 9, 15, 32, 33, 40, 41, 46, 47]] = True
    part = index.keep(write(tmp_path / "keep", index, keep))
    assert (part.num_read, part.num_samples, index.num_read) == (12, 48, 48)
    for samples in passes(load(part), 2):
        assert sorted(samples) == np.flatnonzero(keep).tolist()
    own = [passes(load(part, rank=rank, world_size=2, batch_size=3), 1)[0] for rank in (0, 1)]
    assert sorted(own[0] + own[1]) == np.flatnonzero(keep).tolist()
    # the captions and images are those of the numbers
    batch = next(load(part))
    whole = ensure_index(shards, tokenizers=["simple:77"]).captions("simple:77")
    numbers = batch["sample"].numpy()
    rows = [
        {tuple(whole.tokens(np.array([n]), np.array([c]))[0]) for c in range(count)}
        for n, count in zip(numbers, whole.num_captions(numbers), strict=True)
    ]
    assert all(tuple(t) in r for t, r in zip(batch["tokens"].tolist(), rows, strict=True))


def test_a_place_in_the_data_belongs_to_its_lists(shards: str, tmp_path: Path) -> None:
    index = ensure_index(shards, tokenizers=["simple:77"])
    first = index.keep(write(tmp_path / "a", index, np.arange(48) % 2 == 0))
    other = index.keep(write(tmp_path / "b", index, np.arange(48) % 2 == 1))
    loader = load(first)
    next(loader)
    state = loader.state_dict()
    loader.close()
    with pytest.raises(ValueError, match="keep lists was"):
        load(other).load_state_dict(state)
    with pytest.raises(ValueError, match="keep lists are for training"):
        load(first, train=False)


def test_what_cannot_be_used_is_refused(shards: str, tmp_path: Path) -> None:
    index = ensure_index(shards)
    with pytest.raises(FileNotFoundError, match="data.keep: /nowhere is no folder"):
        index.keep("/nowhere")
    with pytest.raises(ValueError, match="keeps none of this run's samples"):
        index.keep(write(tmp_path / "none", index, np.zeros(48, bool)))
    folder = write(tmp_path / "some", index, np.ones(48, bool))
    place = folder / "shards" / index.shards[1].label / "keep.npy"
    np.save(place, np.ones(15, bool))
    with pytest.raises(ValueError, match="a yes or no for each of 16 samples"):
        index.keep(folder)
    place.write_bytes(b"")
    with pytest.raises(ValueError, match="is no list"):
        index.keep(folder)
    place.unlink()
    with pytest.raises(FileNotFoundError, match="has no list for 1 of 3 shards"):
        index.keep(folder)


def test_a_result_that_was_not_finished_is_refused(shards: str, tmp_path: Path) -> None:
    index = ensure_index(shards, tokenizers=["simple:77"])
    folder = write(tmp_path / "keep", index, np.ones(48, bool))
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished it; run it again"):
        index.keep(folder)
