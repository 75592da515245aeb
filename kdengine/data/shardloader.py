# SPDX-License-Identifier: Apache-2.0
"""The loaders of real data: DALI's output joined with token ids, order and position kept exact.

A pass over the data is cut into equal parts by DALI, one a rank, which change hands after every
pass of training. The largest part, padded to full batches, sets how many batches every rank runs
in a pass; training throws those away that padding can touch, evaluation marks the padding.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdengine.data.batches import Batch, Loader, check_identity
from kdengine.data.limits import allow_open_files
from kdengine.data.noise import mix
from kdengine.data.numbers import SourceNumbers
from kdengine.data.progress import counted
from kdengine.data.views import ViewSpec

if TYPE_CHECKING:
    from kdengine.data.clusters import ClusterRows
    from kdengine.data.dali import ImagePipeline, RawBatch, ReaderSpec
    from kdengine.data.index import DatasetIndex
    from kdengine.data.replay import Replay


class ShardLoader(Loader):
    """What training and evaluation share: from the pipeline's output to a batch."""

    def __init__(
        self,
        index: DatasetIndex,
        *,
        views: dict[str, ViewSpec],
        tokenizers: dict[str, str],
        batch_size: int,
        accum_freq: int,
        rank: int,
        world_size: int,
        num_threads: int,
        seed: int,
        device_id: int | None,
        shuffle_buffer: int,
        caption: str,
        replay: Replay | None,
        crop_seed: int | None,
        with_labels: bool,
        flip: bool,
        clusters: ClusterRows | None,
    ) -> None:
        allow_open_files(len(index.shards))
        self._index = index
        self._views, self._specs = views, list(views.values())
        self._tables = {name: index.captions(key) for name, key in tokenizers.items()}
        self._batch_size, self._accum_freq = batch_size, accum_freq
        self._rank, self._world_size = rank, world_size
        self._num_threads, self._seed, self._caption = num_threads, seed, caption
        self._shuffle_buffer, self._replay, self._crop_seed = shuffle_buffer, replay, crop_seed
        self._labels = index.labels() if with_labels else None
        self._flip, self._clusters = flip, clusters
        self._device_id = device_id
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._numbers = SourceNumbers(index)
        self._pipeline: ImagePipeline | None = None
        self._failures: list[Exception] = []
        self._checkpoint: bytes | None = None

    @abc.abstractmethod
    def _reader(self) -> ReaderSpec: ...

    @abc.abstractmethod
    def _open(self) -> ImagePipeline: ...

    def _pipeline_options(self) -> dict[str, Any]:
        return {
            "num_threads": self._num_threads,
            "device_id": self._device_id,
            "checkpoint": self._checkpoint,
        }

    def _spec(self, rank: int, world_size: int, shuffle_buffer: int) -> ReaderSpec:
        from kdengine.data.dali import ReaderSpec

        # DALI takes no archive of which it reads nothing
        shards = [shard for shard in self._index.shards if shard.num_read != 0]
        return ReaderSpec(
            tars=tuple(shard.tar for shard in shards),
            indexes=tuple(shard.idx for shard in shards),
            rank=rank,
            world_size=world_size,
            batch_size=self._batch_size,
            shuffle_buffer=shuffle_buffer,
            seed=self._seed,
            files=tuple(self._numbers.files),
        )

    def _run(self) -> RawBatch:
        """One batch of the pipeline, remembering the state that follows it."""
        try:
            if self._pipeline is None:
                self._pipeline = self._open()
            raw = self._pipeline.run()
            self._checkpoint = self._pipeline.checkpoint()
        except RuntimeError as error:
            from kdengine.data.diagnose import explain

            self.close()
            if self._failures:
                raise RuntimeError(
                    f"data (rank {self._rank} of {self._world_size}): the stored views cannot be "
                    f"read: {self._failures[0]}; has the cache been changed or removed meanwhile?"
                ) from self._failures[0]
            place = (self._index, self._reader(), self._checkpoint, self._numbers.one)
            message = explain(error, *place, on_gpu=self._device_id is not None)
            raise RuntimeError(message) from error
        return raw

    def _batch(self, raw: RawBatch) -> Batch:
        numbers = self._numbers.all(raw.sources)
        batch = dict(zip(self._views, raw.views, strict=True))
        choice = self._choose(numbers)
        for name, table in self._tables.items():
            batch[name] = self._tensor(table.tokens(numbers, choice))
        if self._flip:
            mirrored = self._tensor(self._noise(numbers) % 2 == 1)[:, None, None, None]
            for name in self._views:
                batch[name] = torch.where(mirrored, batch[name].flip(3), batch[name])
        if self._labels is not None:
            batch["label"] = self._tensor(self._labels[numbers])
        batch["sample"] = self._tensor(numbers)
        batch["window"] = self._tensor(raw.windows)
        if self._replay is not None:
            stored = self._replay.rows(numbers, raw.numbers, choice)
            batch |= {name: self._move(rows) for name, rows in stored.items()}
        if self._clusters is not None:
            of_each = self._clusters.rows(numbers)
            batch |= {name: self._move(rows) for name, rows in of_each.items()}
        return batch

    def _choose(self, numbers: np.ndarray) -> np.ndarray:
        """A caption for each row, from (seed, step, row, sample) alone: nothing to save."""
        if self._caption == "first" or not self._tables:
            return np.zeros(len(numbers), np.int64)
        # all tables hold the same captions
        num_captions = next(iter(self._tables.values())).num_captions(numbers)
        return (self._noise(numbers) % num_captions.astype(np.uint64)).astype(np.int64)

    def _noise(self, numbers: np.ndarray) -> np.ndarray:
        """A draw for each row, uint64 [n], from (seed, step, row, sample) alone."""
        rows = np.arange(len(numbers), dtype=np.uint64)
        return mix(self._seed, self.step, rows, numbers)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return self._move(tensor.to(torch.bool if tensor.dtype == torch.bool else torch.int64))

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device_id is None:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def close(self) -> None:
        """Free threads, files and buffers. Tensors handed out stay valid."""
        self._pipeline = None


class TrainLoader(ShardLoader):
    """Endless random batches; see `build_loader`."""

    def __init__(self, index: DatasetIndex, **options: Any) -> None:
        super().__init__(index, **options)
        num_samples, world_size, batch_size = index.num_read, self._world_size, self._batch_size
        global_batch = world_size * batch_size * self._accum_freq
        self.steps_per_epoch = num_samples // global_batch
        if not self.steps_per_epoch:
            parts = f" x {self._accum_freq} micro-batches" if self._accum_freq > 1 else ""
            kept = f" of {index.num_samples}, those of the keep list," * (index.kept is not None)
            raise ValueError(
                f"data: {counted(num_samples, 'sample')}{kept} cannot fill one global batch of "
                f"{counted(world_size, 'rank')}{parts} x {batch_size} = {global_batch}; lower "
                f"--train.batch-size{' or --train.accum-freq' if parts else ''}, add data, or list "
                "the shards several times"
            )
        self._batches_per_epoch = self.steps_per_epoch * self._accum_freq
        # the reader pads every part to the largest and that to full batches; what the padding
        # touches is run and thrown away
        num_run = _num_batches(num_samples, world_size, batch_size)
        self._num_dropped = num_run - self._batches_per_epoch

    def _reader(self) -> ReaderSpec:
        buffer = min(self._shuffle_buffer, self._index.num_read // self._world_size)
        return self._spec(self._rank, self._world_size, max(1, buffer))

    def _open(self) -> ImagePipeline:
        from kdengine.data.dali import ImagePipeline, derive_seed
        from kdengine.data.windows import stored_windows

        options = self._pipeline_options()
        if self._replay is not None:
            find = functools.partial(_find, self._replay, self._numbers, self._failures)
            seed = derive_seed(self._seed, 4, self._rank)
            options["windows"] = stored_windows(find, self._replay.num_views, seed)
        return ImagePipeline(self._reader(), self._specs, train=True, **options)

    def _next(self) -> Batch:
        if self.step and self.step % self._batches_per_epoch == 0:
            for _ in range(self._num_dropped):
                self._run()
        batch = self._batch(self._run())
        self.step += 1
        return batch

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to fit, in values that are easy to compare."""
        shards = [f"{os.path.basename(s.tar)} {s.num_samples}" for s in self._index.shards]
        return {
            "shards": hashlib.sha256("\n".join(shards).encode()).hexdigest(),
            "num_samples": self._index.num_samples,
            "keep lists": self._index.kept,
            "rank": self._rank,
            "world_size": self._world_size,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle_buffer": self._shuffle_buffer,
            "caption": self._caption,
            **({"flip": True} if self._flip else {}),
            "stored views": self._replay and self._replay.digest,
            "clusters": self._clusters and self._clusters.digest,
            "sizes": sorted(view.size for view in self._views.values()),
            "device": self._device.type,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; see `Loader.state_dict`."""
        blob = bytearray(self._checkpoint or b"")
        state = torch.frombuffer(blob, dtype=torch.uint8).clone() if blob else torch.empty(0)
        return {"step": self.step, "pipeline": state.to(torch.uint8), "identity": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken; see `Loader.load_state_dict`."""
        check_identity(state["identity"], self._identity())
        self.close()
        self.step = int(state["step"])
        self._checkpoint = state["pipeline"].cpu().numpy().tobytes() or None


class EvalLoader(ShardLoader):
    """One exact pass in the order of the index for every `iter()`; see `build_loader`."""

    def __init__(self, index: DatasetIndex, **options: Any) -> None:
        super().__init__(index, **options)
        if index.kept is not None:
            raise ValueError("data: keep lists are for training; evaluation reads every sample")
        if len(self._numbers.first) < len(index.shards):
            tars = [shard.tar for shard in index.shards]
            twice = next(tar for tar in tars if tars.count(tar) > 1)
            raise ValueError(
                f"data: evaluation reads every sample once, but {twice} is listed twice"
            )
        # DALI refuses more parts than samples: ranks beyond read the first part, all invalid
        num_parts = min(self._world_size, index.num_samples)
        self._part = (self._rank if self._rank < num_parts else 0, num_parts)
        self.steps_per_epoch = _num_batches(index.num_samples, num_parts, self._batch_size)
        begin, end = (index.num_samples * (self._rank + i) // num_parts for i in (0, 1))
        self._num_valid = end - begin if self._rank < num_parts else 0

    def _reader(self) -> ReaderSpec:
        return self._spec(*self._part, shuffle_buffer=0)

    def _open(self) -> ImagePipeline:
        from kdengine.data.dali import ImagePipeline
        from kdengine.data.windows import random_windows

        options = {**self._pipeline_options(), "num_batches": self.steps_per_epoch}
        crops = self._crop_seed is not None
        if self._crop_seed is not None:
            options["windows"] = random_windows(self._crop_seed)
        return ImagePipeline(self._reader(), self._specs, train=crops, **options)

    def __iter__(self) -> Loader:
        self.close()
        self.step, self._checkpoint = 0, None
        return self

    def _next(self) -> Batch:
        if self.step == self.steps_per_epoch:
            self.close()
            raise StopIteration
        batch = self._batch(self._run())
        rows = np.arange(self._batch_size) + self.step * self._batch_size
        batch["valid"] = self._tensor(rows < self._num_valid)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Refused: a pass of evaluation is not resumed."""
        raise TypeError("data: an evaluation loader has no position to save; iterate again")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refused: a pass of evaluation is not resumed."""
        raise TypeError("data: an evaluation loader is not resumed; iterate again")


def _find(
    replay: Replay,
    numbers: SourceNumbers,
    failures: list[Exception],
    sources: Sequence[str],
    views: np.ndarray,
) -> np.ndarray:
    """Stored windows for DALI, which owns this function: it must not hold the pipeline's owner."""
    try:
        return replay.windows(numbers.all(sources), views)
    except Exception as error:
        # DALI would tell of it as of an image that does not decode
        failures.append(error)
        raise


def _num_batches(num_samples: int, num_parts: int, batch_size: int) -> int:
    """Batches of a pass when the largest part is padded to full batches."""
    largest = -(-num_samples // num_parts)
    return -(-largest // batch_size)
