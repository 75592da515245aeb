# SPDX-License-Identifier: Apache-2.0
"""Batches of training: order, coverage, windows, captions, exact resume."""

import os
import shutil
import time
from itertools import islice

import numpy as np
import pytest
import torch

from kdengine.data import ViewSpec

NUM_CAPTIONS = 5
VIEW = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def take(loader, num):
    return list(islice(loader, num))


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def numbers(batches):
    return torch.cat([batch["sample"] for batch in batches]).tolist()


def test_batch_has_the_documented_shapes(shards, make):
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
def test_resume_is_bit_equal(shards, rank, position, tmp_path, make):
    whole = make(shards, rank=rank, world_size=2, shuffle_buffer=9)
    assert whole.steps_per_epoch == 4
    take(whole, position)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = take(whole, 10)
    resumed = make(shards, rank=rank, world_size=2, shuffle_buffer=9, num_threads=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(take(resumed, 10), expected)
    assert resumed.step == position + 10


def test_state_can_be_loaded_into_a_running_loader(shards, make):
    loader = make(shards)
    take(loader, 3)
    state = loader.state_dict()
    expected = take(loader, 9)
    loader.load_state_dict(state)
    assert equal(take(loader, 9), expected)


def test_resume_of_a_resumed_loader(shards, make):
    expected = take(make(shards), 14)[11:]
    loader = make(shards)
    for _ in range(2):
        take(loader, 5)
        state = loader.state_dict()
        loader = make(shards)
        loader.load_state_dict(state)
    take(loader, 1)
    assert equal(take(loader, 3), expected)


def test_same_seed_gives_the_same_batches_and_another_does_not(shards, make):
    first, second, other = (take(make(shards, seed=seed), 5) for seed in (1, 1, 2))
    assert equal(first, second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 6), (3, 4), (4, 13), (5, 10)])
def test_epoch_covers_without_overlap_in_equal_steps(shards, world_size, batch_size, make):
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


def test_a_step_of_several_batches_stays_within_a_pass(shards, make):
    options = {"batch_size": 6, "accum_freq": 3, "world_size": 2}
    loaders = [make(shards, rank=rank, **options) for rank in (0, 1)]
    # of the 8 batches that 53 samples fill, each rank's fourth is dropped
    assert [loader.steps_per_epoch for loader in loaders] == [1, 1]
    batches = [take(loader, 36) for loader in loaders]
    for step in range(12):
        seen = [n for own in batches for n in numbers(own[3 * step : 3 * step + 3])]
        assert len(seen) == len(set(seen)) == 36
    assert set(numbers(batches[0]) + numbers(batches[1])) == set(range(53))


@pytest.mark.parametrize("position", [2, 3, 5])
def test_a_step_of_several_batches_resumes_bit_equal(shards, position, make):
    options = {"batch_size": 6, "accum_freq": 3, "world_size": 2, "shuffle_buffer": 9}
    whole, part = make(shards, **options), make(shards, **options)
    take(whole, position)
    part.load_state_dict(whole.state_dict())
    assert equal(take(whole, 5), take(part, 5))


def test_a_step_that_the_data_cannot_fill_is_refused(shards, make):
    with pytest.raises(ValueError, match="1 rank x 9 micro-batches x 6 = 54; .*train.accum-freq"):
        make(shards, accum_freq=9)


def test_what_an_epoch_drops_is_seen_in_others(shards, make):
    loader = make(shards, batch_size=30)
    assert loader.steps_per_epoch == 1
    epochs = [set(numbers(take(loader, 1))) for _ in range(12)]
    assert set().union(*epochs) == set(range(53))
    assert len({frozenset(epoch) for epoch in epochs}) == 12


def test_order_and_windows_are_fresh_in_every_epoch(shards, make):
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


def test_first_epoch_is_shuffled_beyond_a_shard(shards, make):
    order = numbers(take(make(shards, shuffle_buffer=40), 8))
    assert order != sorted(order)
    assert np.abs(np.diff(order)).mean() > 5


def test_ranks_draw_different_windows(shards, make):
    same = [shards[0], shards[0]]
    first, second = (
        take(make(same, rank=rank, world_size=2, shuffle_buffer=1, batch_size=4), 4)
        for rank in (0, 1)
    )
    windows = [torch.cat([b["window"] for b in batches]).tolist() for batches in (first, second)]
    assert sum(a == b for a, b in zip(*windows, strict=True)) < 4


def test_shard_listed_twice_is_upsampling(shards, make):
    loader = make([shards[0], shards[1], shards[0]], batch_size=9)
    seen = numbers(take(loader, loader.steps_per_epoch))
    assert set(seen) <= set(range(37))
    counts = np.bincount(seen, minlength=37)
    assert counts[:17].max() == 2 and counts[17:].max() == 1
    assert len(seen) == 54 and counts[:17].sum() >= 2 * 17 - 1


def test_sample_listed_twice_in_an_index_is_upsampling(test_data, tmp_path, make, write_index):
    shard = write_index(
        test_data / "flickr8k-train-000.tar", tmp_path / "twice.idx", [0, 1, 1, 2, 3, 3]
    )
    loader = make([shard], batch_size=6)
    assert sorted(numbers(take(loader, 1))) == [0, 1, 1, 2, 3, 3]


def test_equal_file_names_in_different_folders_are_told_apart(
    test_data, tmp_path, make, write_index
):
    shards = []
    for folder, source in (("a: b", "flickr8k-train-000.tar"), ("c", "flickr8k-train-001.tar")):
        (tmp_path / folder).mkdir()
        tar = tmp_path / folder / "00000.tar"
        shutil.copy(test_data / source, tar)
        shards.append(write_index(tar, tar.with_suffix(".idx"), list(range(10))))
    evaluation = make(shards, train=False, batch_size=20)
    (batch,) = evaluation
    assert batch["sample"].tolist() == list(range(20))


def test_captions_are_drawn_from_all_and_alike_for_all_tokenizers(shards, make):
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


def test_captions_of_a_sample_change_from_epoch_to_epoch(shards, make):
    loader = make(shards)
    tokens = torch.cat([batch["tokens"] for batch in take(loader, 40)])
    drawn = [set(tokens[tokens[:, 0] == number, 1].tolist()) for number in range(53)]
    # five draws of five captions at least
    assert np.mean([len(captions) for captions in drawn]) > 2.5


def test_first_caption_on_request(shards, make):
    batches = take(make(shards, caption="first"), 4)
    assert all((batch["tokens"][:, 1] == 0).all() for batch in batches)


def test_views_share_the_window(shards, make):
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


def test_batches_handed_out_are_never_overwritten(shards, make):
    loader = make(shards)
    batches = take(loader, 3)
    copies = [{name: x.clone() for name, x in batch.items()} for batch in batches]
    take(loader, 9)
    loader.close()
    assert equal(batches, copies)


def test_close_frees_files_and_threads(shards, make):
    loader = make(shards, num_threads=3)
    next(loader)
    opened, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    loader.close()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > threads - 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= opened - 3
    assert len(os.listdir("/proc/self/task")) <= threads - 3


def test_waiting_time_is_counted(shards, make):
    loader = make(shards)
    begin = time.perf_counter()
    take(loader, 3)
    first = loader.wait_s
    assert 0 < first <= time.perf_counter() - begin
    take(loader, 1)
    assert loader.wait_s > first
