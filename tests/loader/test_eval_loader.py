# SPDX-License-Identifier: Apache-2.0
"""Batches of evaluation and synthetic ones; what is refused; shards damaged after indexing."""

import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from kdengine.data import ViewSpec, build_loader, build_synthetic_loader, ensure_index
from kdengine.data.limits import MAPS, allow_open_files

VIEW = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def take(loader, num):
    return list(islice(loader, num))


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def numbers(batches):
    return torch.cat([batch["sample"] for batch in batches]).tolist()


# (samples, ranks, batch): partial batches, parts of unequal length, more ranks than samples
@pytest.mark.parametrize(
    ("num", "world_size", "batch_size"),
    [(17, 1, 5), (17, 2, 4), (17, 3, 6), (17, 2, 17), (17, 4, 8), (3, 5, 2), (16, 4, 4)],
)
def test_evaluation_reads_every_sample_once(
    test_data, tmp_path, num, world_size, batch_size, make, write_index
):
    tar = test_data / "flickr8k-train-000.tar"
    shard = write_index(tar, tmp_path / "part.idx", list(range(num)))
    options = {"train": False, "world_size": world_size, "batch_size": batch_size}
    loaders = [make([shard], rank=rank, **options) for rank in range(world_size)]
    seen, lengths = [], []
    for loader in loaders:
        batches = list(loader)
        lengths.append((len(batches), loader.steps_per_epoch))
        assert all(len(batch["valid"]) == batch_size for batch in batches)
        seen += [n for b in batches for n in b["sample"][b["valid"]].tolist()]
    assert seen == list(range(num))
    assert len(set(lengths)) == 1 and lengths[0][0] == lengths[0][1]


def test_evaluation_repeats_and_restarts_after_a_break(shards, make):
    loader = make(shards, train=False, batch_size=20)
    first = list(loader)
    next(iter(loader))
    assert equal(list(loader), first)


def test_evaluation_refuses_a_shard_listed_twice(shards, make):
    with pytest.raises(ValueError, match=r"flickr8k-train-000.tar is listed twice"):
        make([shards[0], shards[0]], train=False)


def test_evaluation_has_no_state(shards, make):
    with pytest.raises(TypeError, match="no position to save"):
        make(shards, train=False).state_dict()


def test_too_few_samples_for_a_global_batch_are_refused(shards, make):
    with pytest.raises(ValueError, match=r"53 samples .* 2 ranks x 27 = 54"):
        make(shards, world_size=2, batch_size=27)


def test_empty_index_is_refused(make):
    with pytest.raises(ValueError, match=r"no good sample among 3 \(image-decode 3\); see /q"):
        make([])


def test_one_name_for_two_tensors_is_refused(shards, make):
    with pytest.raises(ValueError, match=r"\['image'\]"):
        make(shards, tokenizers={"image": "simple:77"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed was 7, is 8"),
        ({"batch_size": 5}, "batch_size was 6, is 5"),
        ({"rank": 1}, "rank was 0, is 1"),
        ({"world_size": 3}, "world_size was 2, is 3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_state_of_another_loader_is_refused(shards, change, message, make):
    state = make(shards, world_size=2).state_dict()
    with pytest.raises(ValueError, match=message):
        make(shards, **{"world_size": 2, **change}).load_state_dict(state)


def test_state_of_other_data_is_refused(shards, make):
    state = make(shards).state_dict()
    with pytest.raises(ValueError, match="num_samples was 53, is 37"):
        make(shards[:2]).load_state_dict(state)


@pytest.fixture
def own_shard(test_data, tmp_path, write_index):
    """A shard that a test may damage."""
    tar = tmp_path / "own.tar"
    shutil.copy(test_data / "flickr8k-train-000.tar", tar)
    tar.chmod(0o644)
    return write_index(tar, tmp_path / "own.idx", list(range(30)))


@pytest.mark.parametrize("position", [0, 2], ids=["first-batch", "later-batch"])
def test_image_overwritten_after_indexing_is_named(own_shard, position, make):
    tar, idx, _ = own_shard
    clean = make([own_shard], batch_size=5, train=False)
    number = take(clean, position + 1)[-1]["sample"][3].item()
    clean.close()
    _, offset, size, _ = Path(idx).read_text().splitlines()[1 + number].split()
    with open(tar, "r+b") as file:
        file.seek(int(offset))
        file.write(b"\x07" * int(size))
    loader = make([own_shard], batch_size=5, train=False)
    take(loader, position)
    with pytest.raises(RuntimeError, match=rf"sample {number} \(key 'key-{number}'") as caught:
        next(loader)
    assert tar in str(caught.value) and "kdengine index" in str(caught.value)


def test_image_overwritten_is_named_in_shuffled_training(own_shard, make):
    tar, idx, _ = own_shard
    _, offset, size, _ = Path(idx).read_text().splitlines()[1 + 11].split()
    with open(tar, "r+b") as file:
        file.seek(int(offset))
        file.write(b"\x07" * int(size))
    with pytest.raises(RuntimeError, match=r"sample 11 \(key 'key-11'"):
        take(make([own_shard], batch_size=3), 10)


def test_truncated_shard_is_named(own_shard, make):
    tar, _, _ = own_shard
    loader = make([own_shard], batch_size=2, shuffle_buffer=1)
    next(loader)
    os.truncate(tar, 2048)
    with pytest.raises(RuntimeError, match=r"cannot read .*own\.tar") as caught:
        take(loader, 14)
    assert f"kdengine index {tar}" in str(caught.value)


def test_limit_on_open_files_is_raised_as_far_as_allowed(monkeypatch):
    raised = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 50_000))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: raised.append(limits))
    allow_open_files(1000)
    assert raised == [(2 * 1000 + 3 * MAPS + 1024, 50_000)]
    with pytest.raises(RuntimeError, match="hard limit is 50000"):
        allow_open_files(100_000)


def test_loader_reads_a_built_index(test_data, tmp_path):
    index = ensure_index(
        [str(test_data / "hostile-000.tar"), str(test_data / "cocomini-by-000.tar")],
        index_dir=str(tmp_path),
        tokenizers=["simple:77"],
        num_workers=0,
    )
    options = {"views": {"image": VIEW}, "tokenizers": {"tokens": "simple:77"}, "num_threads": 1}
    (batch,) = build_loader(index, batch_size=128, train=False, caption="first", **options)
    valid = batch["valid"]
    seen = batch["sample"][valid].numpy()
    assert seen.tolist() == list(range(index.num_samples))
    expected = torch.from_numpy(index.captions("simple:77").tokens(seen, None)).long()
    assert torch.equal(batch["tokens"][valid], expected)
    training = build_loader(index, batch_size=32, **options)
    batches = take(training, 2 * training.steps_per_epoch)
    assert all(torch.isfinite(batch["image"]).all() for batch in batches)


def make_synthetic(**options):
    defaults = {
        "views": {"image": VIEW, "teacher_image": ViewSpec(16, VIEW.mean, VIEW.std)},
        "tokenizers": {"tokens": "simple:77", "teacher_tokens": "hf:some/model:64"},
        "batch_size": 4,
    }
    return build_synthetic_loader(20, **{**defaults, **options})


def test_synthetic_batch_looks_like_a_real_one():
    loader = make_synthetic()
    batch = next(loader)
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "image": ((4, 3, 32, 32), torch.float32),
        "teacher_image": ((4, 3, 16, 16), torch.float32),
        "tokens": ((4, 77), torch.int64),
        "teacher_tokens": ((4, 64), torch.int64),
        "sample": ((4,), torch.int64),
        "window": ((4, 4), torch.int64),
    }
    assert loader.steps_per_epoch == 5
    assert (batch["tokens"].argmax(1) == 76).all()


def test_synthetic_resume_is_bit_equal():
    loader = make_synthetic(rank=1, world_size=2)
    take(loader, 7)
    state = loader.state_dict()
    expected = take(loader, 6)
    resumed = make_synthetic(rank=1, world_size=2)
    resumed.load_state_dict(state)
    assert equal(take(resumed, 6), expected)


def test_synthetic_ranks_differ_and_cover_an_epoch():
    loaders = [make_synthetic(rank=rank, world_size=2) for rank in (0, 1)]
    batches = [take(loader, loader.steps_per_epoch) for loader in loaders]
    assert sorted(numbers(batches[0]) + numbers(batches[1])) == list(range(16))
    assert not torch.equal(batches[0][0]["image"], batches[1][0]["image"])


def test_synthetic_needs_a_global_batch():
    with pytest.raises(ValueError, match="2 ranks x 11 = 22, got 20"):
        make_synthetic(batch_size=11, world_size=2)
