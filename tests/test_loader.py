# SPDX-License-Identifier: Apache-2.0
"""The loaders on hand-written indexes: order, coverage, exact resume, evaluation, failures."""

import os
import shutil
import tarfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kdengine.data import ViewSpec, build_loader, build_synthetic_loader, ensure_index
from kdengine.data.shardloader import allow_open_files

NUM_CAPTIONS = 5
VIEW = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass
class Shard:
    tar: str
    idx: str
    num_samples: int
    first: int


class Table:
    """Tokens that say which caption of which sample they are."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def num_captions(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), NUM_CAPTIONS)

    def tokens(self, numbers: np.ndarray, choice: np.ndarray | None = None) -> np.ndarray:
        choice = np.zeros_like(numbers) if choice is None else choice
        return np.stack([numbers, choice, np.full_like(numbers, self.mark)], 1).astype(np.int32)


class Index:
    """The part of a DatasetIndex that loaders use."""

    num_quarantined = 3

    def __init__(self, shards: list[tuple[str, str, int]]) -> None:
        firsts = np.cumsum([0] + [shard[2] for shard in shards]).tolist()
        self.shards = tuple(Shard(*s, first) for s, first in zip(shards, firsts, strict=False))
        self.num_samples = firsts[-1]

    def captions(self, tokenizer_id: str) -> Table:
        return Table(len(tokenizer_id))

    def key(self, number: int) -> str:
        return f"key-{number}"


def write_index(tar: Path, idx: Path, names: list[int]) -> tuple[str, str, int]:
    """A v1.2 index of the first images of an archive, by their numbers."""
    with tarfile.open(tar) as archive:
        images = [m for m in archive if m.name.endswith(".jpg")]
    lines = [f"img {images[n].offset_data} {images[n].size} {n}" for n in names]
    idx.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    return str(tar), str(idx), len(lines)


@pytest.fixture
def shards(test_data, tmp_path):
    """Three shards of 17, 20 and 16 samples."""
    return [
        write_index(
            test_data / f"flickr8k-train-00{i}.tar", tmp_path / f"{i}.idx", list(range(num))
        )
        for i, num in enumerate((17, 20, 16))
    ]


def make(shards, **options):
    defaults = {
        "views": {"image": VIEW},
        "tokenizers": {"tokens": "simple:77"},
        "batch_size": 6,
        "num_threads": 1,
        "seed": 7,
    }
    return build_loader(Index(shards), **{**defaults, **options})


def take(loader, num):
    return list(islice(loader, num))


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def numbers(batches):
    return torch.cat([batch["sample"] for batch in batches]).tolist()


def test_batch_has_the_documented_shapes(shards):
    batch = next(make(shards))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "image": ((6, 3, 32, 32), torch.float32),
        "tokens": ((6, 3), torch.int64),
        "sample": ((6,), torch.int64),
        "window": ((6, 4), torch.int64),
    }


# 53 samples, 2 ranks, batch 6: 4 steps an epoch, of 5 batches that the reader runs
@pytest.mark.parametrize("position", [0, 2, 4, 5, 8, 11])
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_is_bit_equal(shards, rank, position, tmp_path):
    whole = make(shards, rank=rank, world_size=2, shuffle_buffer=9)
    assert whole.steps_per_epoch == 4
    take(whole, position)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = take(whole, 10)
    resumed = make(shards, rank=rank, world_size=2, shuffle_buffer=9, num_threads=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(take(resumed, 10), expected)
    assert resumed.step == position + 10


def test_state_can_be_loaded_into_a_running_loader(shards):
    loader = make(shards)
    take(loader, 3)
    state = loader.state_dict()
    expected = take(loader, 9)
    loader.load_state_dict(state)
    assert equal(take(loader, 9), expected)


def test_resume_of_a_resumed_loader(shards):
    expected = take(make(shards), 14)[11:]
    loader = make(shards)
    for _ in range(2):
        take(loader, 5)
        state = loader.state_dict()
        loader = make(shards)
        loader.load_state_dict(state)
    take(loader, 1)
    assert equal(take(loader, 3), expected)


def test_same_seed_gives_the_same_batches_and_another_does_not(shards):
    first, second, other = (take(make(shards, seed=seed), 5) for seed in (1, 1, 2))
    assert equal(first, second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 6), (3, 4), (4, 13), (5, 10)])
def test_epoch_covers_without_overlap_in_equal_steps(shards, world_size, batch_size):
    loaders = [
        make(shards, rank=rank, world_size=world_size, batch_size=batch_size, views={"image": VIEW})
        for rank in range(world_size)
    ]
    steps = 53 // (world_size * batch_size)
    assert [loader.steps_per_epoch for loader in loaders] == [steps] * world_size
    for _ in range(3):
        seen = [number for loader in loaders for number in numbers(take(loader, steps))]
        assert len(seen) == len(set(seen)) == steps * world_size * batch_size
        assert set(seen) <= set(range(53))


def test_what_an_epoch_drops_is_seen_in_others(shards):
    loader = make(shards, batch_size=30)
    assert loader.steps_per_epoch == 1
    epochs = [set(numbers(take(loader, 1))) for _ in range(12)]
    assert set().union(*epochs) == set(range(53))
    assert len({frozenset(epoch) for epoch in epochs}) == 12


def test_order_and_windows_are_fresh_in_every_epoch(shards):
    loader = make(shards)
    first, second = take(loader, 8), take(loader, 8)
    assert numbers(first) != numbers(second)
    windows = [
        {n: w for b in epoch for n, w in zip(numbers([b]), b["window"].tolist(), strict=True)}
        for epoch in (first, second)
    ]
    common = windows[0].keys() & windows[1].keys()
    changed = sum(windows[0][number] != windows[1][number] for number in common)
    assert changed > 0.9 * len(common)


def test_first_epoch_is_shuffled_beyond_a_shard(shards):
    order = numbers(take(make(shards, shuffle_buffer=40), 8))
    assert order != sorted(order)
    assert np.abs(np.diff(order)).mean() > 5


def test_ranks_draw_different_windows(shards):
    same = [shards[0], shards[0]]
    first, second = (
        take(make(same, rank=rank, world_size=2, shuffle_buffer=1, batch_size=4), 4)
        for rank in (0, 1)
    )
    windows = [torch.cat([b["window"] for b in batches]).tolist() for batches in (first, second)]
    assert sum(a == b for a, b in zip(*windows, strict=True)) < 4


def test_shard_listed_twice_is_upsampling(shards):
    loader = make([shards[0], shards[1], shards[0]], batch_size=9)
    seen = numbers(take(loader, loader.steps_per_epoch))
    assert set(seen) <= set(range(37))
    counts = np.bincount(seen, minlength=37)
    assert counts[:17].max() == 2 and counts[17:].max() == 1
    assert len(seen) == 54 and counts[:17].sum() >= 2 * 17 - 1


def test_sample_listed_twice_in_an_index_is_upsampling(test_data, tmp_path):
    shard = write_index(
        test_data / "flickr8k-train-000.tar", tmp_path / "twice.idx", [0, 1, 1, 2, 3, 3]
    )
    loader = make([shard], batch_size=6)
    assert sorted(numbers(take(loader, 1))) == [0, 1, 1, 2, 3, 3]


def test_equal_file_names_in_different_folders_are_told_apart(test_data, tmp_path):
    shards = []
    for folder, source in (("a: b", "flickr8k-train-000.tar"), ("c", "flickr8k-train-001.tar")):
        (tmp_path / folder).mkdir()
        tar = tmp_path / folder / "00000.tar"
        shutil.copy(test_data / source, tar)
        shards.append(write_index(tar, tar.with_suffix(".idx"), list(range(10))))
    evaluation = make(shards, train=False, batch_size=20)
    (batch,) = evaluation
    assert batch["sample"].tolist() == list(range(20))


def test_captions_are_drawn_from_all_and_alike_for_all_tokenizers(shards):
    tokenizers = {"tokens": "simple:77", "teacher_tokens": "hf:some/model:64"}
    loader = make(shards, tokenizers=tokenizers)
    batches = take(loader, 16)
    tokens = torch.cat([batch["tokens"] for batch in batches])
    teacher = torch.cat([batch["teacher_tokens"] for batch in batches])
    assert tokens[:, 0].tolist() == numbers(batches)
    assert torch.equal(tokens[:, :2], teacher[:, :2])
    assert not torch.equal(tokens[:, 2], teacher[:, 2])
    counts = torch.bincount(tokens[:, 1], minlength=NUM_CAPTIONS)
    assert len(counts) == NUM_CAPTIONS and counts.min() >= 8


def test_captions_of_a_sample_change_from_epoch_to_epoch(shards):
    loader = make(shards)
    tokens = torch.cat([batch["tokens"] for batch in take(loader, 40)])
    drawn = [set(tokens[tokens[:, 0] == number, 1].tolist()) for number in range(53)]
    # five draws of five captions at least
    assert np.mean([len(captions) for captions in drawn]) > 2.5


def test_first_caption_on_request(shards):
    batches = take(make(shards, caption="first"), 4)
    assert all((batch["tokens"][:, 1] == 0).all() for batch in batches)


def test_views_share_the_window(shards):
    other = ViewSpec(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    large = ViewSpec(64, VIEW.mean, VIEW.std)
    batch = next(make(shards, views={"image": VIEW, "teacher_image": other, "large": large}))
    scale = (torch.tensor(VIEW.std) / torch.tensor(other.std)).view(3, 1, 1)
    shift = ((torch.tensor(VIEW.mean) - torch.tensor(other.mean)) / torch.tensor(other.std)).view(
        3, 1, 1
    )
    torch.testing.assert_close(batch["teacher_image"], batch["image"] * scale + shift)
    reduced = torch.nn.functional.avg_pool2d(batch["large"], 2)
    assert (reduced - batch["image"]).abs().mean() < 0.1


def test_batches_handed_out_are_never_overwritten(shards):
    loader = make(shards)
    batches = take(loader, 3)
    copies = [{name: x.clone() for name, x in batch.items()} for batch in batches]
    take(loader, 9)
    loader.close()
    assert equal(batches, copies)


def test_close_frees_files_and_threads(shards):
    loader = make(shards, num_threads=3)
    next(loader)
    opened, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    loader.close()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > threads - 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= opened - 3
    assert len(os.listdir("/proc/self/task")) <= threads - 3


def test_waiting_time_is_counted(shards):
    loader = make(shards)
    begin = time.perf_counter()
    take(loader, 3)
    first = loader.wait_s
    assert 0 < first <= time.perf_counter() - begin
    take(loader, 1)
    assert loader.wait_s > first


# (samples, ranks, batch): partial batches, parts of unequal length, more ranks than samples
@pytest.mark.parametrize(
    ("num", "world_size", "batch_size"),
    [(17, 1, 5), (17, 2, 4), (17, 3, 6), (17, 2, 17), (17, 4, 8), (3, 5, 2), (16, 4, 4)],
)
def test_evaluation_reads_every_sample_once(test_data, tmp_path, num, world_size, batch_size):
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


def test_evaluation_repeats_and_restarts_after_a_break(shards):
    loader = make(shards, train=False, batch_size=20)
    first = list(loader)
    next(iter(loader))
    assert equal(list(loader), first)


def test_evaluation_refuses_a_shard_listed_twice(shards):
    with pytest.raises(ValueError, match=r"flickr8k-train-000.tar is listed twice"):
        make([shards[0], shards[0]], train=False)


def test_evaluation_has_no_state(shards):
    with pytest.raises(TypeError, match="no position to save"):
        make(shards, train=False).state_dict()


def test_too_few_samples_for_a_global_batch_are_refused(shards):
    with pytest.raises(ValueError, match=r"53 samples .* 2 ranks x 27 = 54"):
        make(shards, world_size=2, batch_size=27)


def test_empty_index_is_refused():
    with pytest.raises(ValueError, match=r"no good sample \(3 are quarantined\)"):
        make([])


def test_one_name_for_two_tensors_is_refused(shards):
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
def test_state_of_another_loader_is_refused(shards, change, message):
    state = make(shards, world_size=2).state_dict()
    with pytest.raises(ValueError, match=message):
        make(shards, **{"world_size": 2, **change}).load_state_dict(state)


def test_state_of_other_data_is_refused(shards):
    state = make(shards).state_dict()
    with pytest.raises(ValueError, match="num_samples was 53, is 37"):
        make(shards[:2]).load_state_dict(state)


@pytest.fixture
def own_shard(test_data, tmp_path):
    """A shard that a test may damage."""
    tar = tmp_path / "own.tar"
    shutil.copy(test_data / "flickr8k-train-000.tar", tar)
    tar.chmod(0o644)
    return write_index(tar, tmp_path / "own.idx", list(range(30)))


@pytest.mark.parametrize("position", [0, 2], ids=["first-batch", "later-batch"])
def test_image_overwritten_after_indexing_is_named(own_shard, position):
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


def test_image_overwritten_is_named_in_shuffled_training(own_shard):
    tar, idx, _ = own_shard
    _, offset, size, _ = Path(idx).read_text().splitlines()[1 + 11].split()
    with open(tar, "r+b") as file:
        file.seek(int(offset))
        file.write(b"\x07" * int(size))
    with pytest.raises(RuntimeError, match=r"sample 11 \(key 'key-11'"):
        take(make([own_shard], batch_size=3), 10)


def test_truncated_shard_is_named(own_shard):
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
    assert raised == [(3024, 50_000)]
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
