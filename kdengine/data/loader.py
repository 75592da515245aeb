# SPDX-License-Identifier: Apache-2.0
"""Loaders: endless, resumable batches for training; one exact pass over the data for evaluation."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from kdengine.data.views import ViewSpec

if TYPE_CHECKING:
    from kdengine.data.dali import WindowSource
    from kdengine.data.index import DatasetIndex

Batch = dict[str, torch.Tensor]

# names of a batch that no view and no token tensor may take
RESERVED = ("sample", "valid", "window")


class Loader(abc.ABC):
    """An iterator of batches, as dictionaries of tensors on one device.

    Attributes:
        steps_per_epoch: batches in a pass over the data, equal on all ranks.
        step: batches handed out so far.
        wait_s: seconds spent in `next()` so far: what training waited for data. On a GPU this is
            the time of the host; kernels that are still queued are waited for on the stream.
    """

    steps_per_epoch: int
    step: int = 0
    wait_s: float = 0.0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            return self._next()
        finally:
            self.wait_s += time.perf_counter() - begin

    @abc.abstractmethod
    def _next(self) -> Batch: ...

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out: plain values and one byte tensor.

        It belongs to this rank, and only continues on the same data, batch size, world size and
        seed. Taking it costs nothing.
        """

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken: the next batches are bit-equal.

        Raises:
            ValueError: the state belongs to another loader; the message names what differs.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free threads, files and buffers. Tensors handed out stay valid."""


def build_loader(
    index: DatasetIndex,
    *,
    views: Mapping[str, ViewSpec],
    tokenizers: Mapping[str, str],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 4,
    seed: int = 0,
    train: bool = True,
    device_id: int | None = None,
    shuffle_buffer: int = 4096,
    caption: Literal["random", "first"] = "random",
    window_source: WindowSource | None = None,
) -> Loader:
    """A loader of the good samples of an index, decoded by DALI in background threads.

    Training: endless; in every pass over the data the ranks read disjoint parts, and what does
    not fill a batch on every rank is dropped (others in each pass, as the order changes). Windows
    and captions are drawn anew each time.
    Evaluation: each `iter()` is one pass in the order of the index, every sample on exactly one
    rank; ranks get equally many batches, and rows that fill up the last ones repeat a sample and
    are False in `valid`.

    Shapes, with b = batch_size on this rank:
        each view: [b, 3, size, size] float32, normalised; all views show the same window.
        each tokenizer: [b, context] int64; all of the same caption.
        sample: [b] int64, global sample number; a shard listed twice keeps its first numbers.
        window: [b, 4] int64, (top, left, height, width) in the stored image.
        valid: [b] bool, only in evaluation.

    Args:
        index: from `ensure_index`.
        views: images to make, by their name in the batch.
        tokenizers: tokenizer ids, by the name of their tokens in the batch; `index` holds them.
        batch_size: samples on each rank.
        rank: number of this rank.
        world_size: number of ranks.
        num_threads: decoding threads; the pixels do not depend on it.
        seed: equal on all ranks, which still draw different windows.
        train: endless and random, or one exact pass.
        device_id: GPU for decoding and output, None for the CPU.
        shuffle_buffer: samples, still encoded, from which the next one is drawn.
        caption: one of a sample's captions at random, or always the first.
        window_source: replaces the random windows of training; see `kdengine.data.dali`.

    Memory: `shuffle_buffer` encoded images, and about four batches.

    Raises:
        ValueError: an argument is off, the index is empty, or training has fewer samples than one
            global batch.
        RuntimeError: the limit on open files is too low for so many shards. While iterating: DALI
            cannot read or decode a sample although the index lists it, because a shard was changed
            since; the message names both.
    """
    who = "build_loader"
    if not index.num_samples:
        raise ValueError(
            f"{who}: the index has no good sample ({index.num_quarantined} are quarantined); "
            "see quarantine.jsonl beside the shards for the causes"
        )
    if not 0 <= rank < world_size or min(batch_size, num_threads) < 1 or seed < 0:
        raise ValueError(
            f"{who}: expected 0 <= rank < world_size, batch_size and num_threads of at least 1, "
            f"seed of at least 0; got rank {rank} of {world_size}, batch_size {batch_size}, "
            f"num_threads {num_threads}, seed {seed}"
        )
    if caption not in ("random", "first"):
        raise ValueError(f"{who}: caption must be 'random' or 'first', got {caption!r}")
    check_names(who, views, tokenizers)
    from kdengine.data.shardloader import EvalLoader, TrainLoader

    kind = TrainLoader if train else EvalLoader
    return kind(
        index,
        views=dict(views),
        tokenizers=dict(tokenizers),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        seed=seed,
        device_id=device_id,
        shuffle_buffer=shuffle_buffer,
        caption=caption,
        window_source=window_source,
    )


def check_names(who: str, views: Mapping[str, ViewSpec], tokenizers: Mapping[str, str]) -> None:
    """Refuse a batch without images, or with one name for two tensors."""
    if not views:
        raise ValueError(f"{who}: expected at least one view, got none")
    names = [*views, *tokenizers, *RESERVED]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{who}: the names {twice} stand for more than one tensor of a batch; "
            f"views and tokenizers need different names, and not one of {list(RESERVED)}"
        )


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError naming what differs between a saved loader and this one."""
    wrong = [
        f"{key} was {saved.get(key)}, is {own[key]}" for key in own if saved.get(key) != own[key]
    ]
    if wrong:
        raise ValueError(
            f"load_state_dict: the data position belongs to another loader: {'; '.join(wrong)}; "
            "resume with the configuration and data of the checkpoint, or start a new run"
        )
