# SPDX-License-Identifier: Apache-2.0
"""The loaders of real data: DALI's output joined with token ids, order and position kept exact.

A pass over the data is cut into equal parts by DALI, one a rank, which change hands after every
pass of training. The largest part, padded to full batches, sets how many batches every rank runs
in a pass; training throws those away that padding can touch, evaluation marks the padding.
"""

from __future__ import annotations

import abc
import hashlib
import os
import resource
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdengine.data.batches import Batch, Loader, check_identity
from kdengine.data.progress import counted
from kdengine.data.views import ViewSpec

if TYPE_CHECKING:
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
        rank: int,
        world_size: int,
        num_threads: int,
        seed: int,
        device_id: int | None,
        shuffle_buffer: int,
        caption: str,
        replay: Replay | None,
        crop_seed: int | None,
    ) -> None:
        allow_open_files(len(index.shards))
        self._index = index
        self._views, self._specs = views, list(views.values())
        self._tables = {name: index.captions(key) for name, key in tokenizers.items()}
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._num_threads, self._seed, self._caption = num_threads, seed, caption
        self._shuffle_buffer, self._replay, self._crop_seed = shuffle_buffer, replay, crop_seed
        self._device_id = device_id
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        # a shard listed twice keeps the numbers of its first place
        self._first: dict[str, int] = {}
        for shard in index.shards:
            self._first.setdefault(shard.tar, shard.first)
        # images of class folders are files of their own
        files = [] if index.classes is None else index.files()
        self._number_of_file = {file: number for number, file in enumerate(files)}
        self._pipeline: ImagePipeline | None = None
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

        return ReaderSpec(
            tars=tuple(shard.tar for shard in self._index.shards),
            indexes=tuple(shard.idx for shard in self._index.shards),
            rank=rank,
            world_size=world_size,
            batch_size=self._batch_size,
            shuffle_buffer=shuffle_buffer,
            seed=self._seed,
            files=tuple(self._number_of_file),
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
            place = (self._index, self._reader(), self._checkpoint, self._number)
            message = explain(error, *place, on_gpu=self._device_id is not None)
            raise RuntimeError(message) from error
        return raw

    def _number(self, source: str) -> int:
        """Global sample number of a `tar:offset:name` (the tar may have colons) or of a file."""
        if self._number_of_file:
            return self._number_of_file[source]
        tar, _, local = source.rsplit(":", 2)
        return self._first[tar] + int(local)

    def _batch(self, raw: RawBatch) -> Batch:
        numbers = self._numbers(raw.sources)
        batch = dict(zip(self._views, raw.views, strict=True))
        choice = self._choose(numbers)
        for name, table in self._tables.items():
            batch[name] = self._tensor(table.tokens(numbers, choice))
        batch["sample"] = self._tensor(numbers)
        batch["window"] = self._tensor(raw.windows)
        if self._replay is not None:
            stored = self._replay.rows(numbers, raw.numbers, choice)
            batch |= {name: self._move(rows) for name, rows in stored.items()}
        return batch

    def _numbers(self, sources: Sequence[str]) -> np.ndarray:
        return np.array([self._number(source) for source in sources], np.int64)

    def _choose(self, numbers: np.ndarray) -> np.ndarray:
        """A caption for each row, from (seed, step, row, sample) alone: nothing to save."""
        if self._caption == "first" or not self._tables:
            return np.zeros(len(numbers), np.int64)
        # all tables hold the same captions
        num_captions = next(iter(self._tables.values())).num_captions(numbers)
        rows = np.arange(len(numbers), dtype=np.uint64)
        noise = mix(self._seed, self.step, rows, numbers)
        return (noise % num_captions.astype(np.uint64)).astype(np.int64)

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
        num_samples, world_size, batch_size = index.num_samples, self._world_size, self._batch_size
        self.steps_per_epoch = num_samples // (world_size * batch_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"data: {counted(num_samples, 'sample')} cannot fill one global batch of "
                f"{counted(world_size, 'rank')} x {batch_size} = {world_size * batch_size}; lower "
                "--train.batch-size, add data, or list the shards several times"
            )
        # the reader pads every part to the largest and that to full batches; what the padding
        # touches is run and thrown away
        self._num_dropped = _num_batches(num_samples, world_size, batch_size) - self.steps_per_epoch

    def _reader(self) -> ReaderSpec:
        buffer = min(self._shuffle_buffer, self._index.num_samples // self._world_size)
        return self._spec(self._rank, self._world_size, max(1, buffer))

    def _open(self) -> ImagePipeline:
        from kdengine.data.dali import ImagePipeline, derive_seed, stored_windows

        options, replay = self._pipeline_options(), self._replay
        if replay is not None:

            def find(sources: Sequence[str], views: np.ndarray) -> np.ndarray:
                return replay.windows(self._numbers(sources), views)

            seed = derive_seed(self._seed, 4, self._rank)
            options["windows"] = stored_windows(find, replay.num_views, seed)
        return ImagePipeline(self._reader(), self._specs, train=True, **options)

    def _next(self) -> Batch:
        if self.step and self.step % self.steps_per_epoch == 0:
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
            "rank": self._rank,
            "world_size": self._world_size,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle_buffer": self._shuffle_buffer,
            "caption": self._caption,
            "stored views": self._replay and self._replay.digest,
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
        if len(self._first) < len(index.shards):
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
        from kdengine.data.dali import ImagePipeline, random_windows

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


def _num_batches(num_samples: int, num_parts: int, batch_size: int) -> int:
    """Batches of a pass when the largest part is padded to full batches."""
    largest = -(-num_samples // num_parts)
    return -(-largest // batch_size)


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 from integers and integer arrays (SplitMix64), equal on any machine."""
    noise: np.ndarray = np.zeros((), np.uint64)
    for word in words:
        with np.errstate(over="ignore"):
            noise = noise + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            noise = (noise ^ (noise >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            noise = (noise ^ (noise >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            noise = noise ^ (noise >> np.uint64(31))
    return noise


def allow_open_files(num_files: int) -> None:
    """Raise the soft limit on open files where the reader, which opens every archive, needs it.

    Raises:
        RuntimeError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the limit is for the process: leave room for other loaders, sockets and libraries
    needed = 2 * num_files + 1024
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"data: {num_files} archives need a limit of {needed} open files; the hard "
            f"limit is {hard}; raise it (ulimit -Hn {needed}) or use fewer, larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
