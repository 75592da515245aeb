# SPDX-License-Identifier: Apache-2.0
"""Loaders: endless, resumable batches for training; one exact pass over the data for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from kdengine.data.batches import Loader, check_names
from kdengine.data.shardloader import EvalLoader, TrainLoader
from kdengine.data.summary import refuse_empty
from kdengine.data.views import ViewSpec

if TYPE_CHECKING:
    from kdengine.data.clusters import ClusterRows
    from kdengine.data.index import DatasetIndex
    from kdengine.data.replay import Replay


def build_loader(
    index: DatasetIndex,
    *,
    views: Mapping[str, ViewSpec],
    tokenizers: Mapping[str, str],
    batch_size: int,
    accum_freq: int = 1,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 4,
    seed: int = 0,
    train: bool = True,
    device_id: int | None = None,
    shuffle_buffer: int = 4096,
    caption: Literal["random", "first"] = "random",
    replay: Replay | None = None,
    crop_seed: int | None = None,
    with_labels: bool = False,
    flip: bool = False,
    clusters: ClusterRows | None = None,
) -> Loader:
    """A loader of the good samples of an index, decoded by DALI in background threads.

    Training: endless; in every pass over the data the ranks read disjoint parts, and what does
    not fill the batches of a step on every rank is dropped (others in each pass, as the order
    changes): no step reaches into the next pass. Windows and captions are drawn anew each time.
    Evaluation: each `iter()` is one pass in the order of the index, every sample on exactly one
    rank; ranks get equally many batches, and rows that fill up the last ones repeat a sample and
    are False in `valid`.

    Shapes, with b = batch_size on this rank:
        each view: [b, 3, size, size] float32, normalised; all views show the same window.
        each tokenizer: [b, context] int64; all of the same caption.
        label: [b] int64, only `with_labels`: the class number of each sample.
        sample: [b] int64, global sample number; a shard listed twice keeps its first numbers.
        window: [b, 4] int64, (top, left, height, width) in the stored image.
        valid: [b] bool, only in evaluation.

    Args:
        index: from `ensure_index`.
        views: images to make, by their name in the batch.
        tokenizers: tokenizer ids, by the name of their tokens in the batch; `index` holds them.
        batch_size: samples on each rank.
        accum_freq: in training, batches of a step.
        rank: number of this rank.
        world_size: number of ranks.
        num_threads: decoding threads; the pixels do not depend on it.
        seed: equal on all ranks, which still draw different windows.
        train: endless and random, or one exact pass.
        device_id: GPU for decoding and output, None for the CPU.
        shuffle_buffer: samples, still encoded, from which the next one is drawn.
        caption: one of a sample's captions at random, or always the first.
        replay: in training, stored views in place of random windows, one of a sample's at random,
            and what is stored with them in the batch.
        crop_seed: in evaluation, random windows of training drawn with this seed, in place of the
            centre.
        with_labels: tell the class of each sample.
        flip: in training, mirror half of the images, all views alike, drawn anew each time.
        clusters: attached to this index; tells the cluster of each sample, and its teacher's
            softmax over clusters (see `ClusterRows.rows`).

    Memory: `shuffle_buffer` encoded images, and about four batches.

    Raises:
        ValueError: an argument is off, the index is empty, training on class folders has captions,
            or there are fewer samples than one global batch.
        RuntimeError: the limit on open files is too low for so many shards. While iterating: DALI
            cannot read or decode a sample although the index lists it, because a shard was changed
            since; the message names both.
    """
    refuse_empty(index)
    if train and index.classes is not None and tokenizers:
        folder = index.shards[0].tar
        raise ValueError(
            f"data: training on pairs reads shards, and {folder} holds class folders, which have "
            "no captions"
        )
    if not 0 <= rank < world_size or seed < 0:
        raise ValueError(
            f"data: expected 0 <= rank < world_size and a seed of at least 0; got rank {rank} of "
            f"{world_size}, seed {seed}"
        )
    if min(batch_size, accum_freq, num_threads) < 1:
        raise ValueError(
            "data: batch size, batches of a step (accum_freq) and decoding threads (workers) must "
            f"be at least 1; got a batch size of {batch_size}, {accum_freq} batches and "
            f"{num_threads} threads"
        )
    if caption not in ("random", "first"):
        raise ValueError(f"data.caption: expected 'random' or 'first', got {caption!r}")
    check_names(views, tokenizers)
    kind = TrainLoader if train else EvalLoader
    return kind(
        index,
        views=dict(views),
        tokenizers=dict(tokenizers),
        batch_size=batch_size,
        accum_freq=accum_freq,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        seed=seed,
        device_id=device_id,
        shuffle_buffer=shuffle_buffer,
        caption=caption,
        replay=replay,
        crop_seed=crop_seed,
        with_labels=with_labels,
        flip=flip,
        clusters=clusters,
    )
