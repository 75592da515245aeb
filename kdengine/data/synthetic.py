# SPDX-License-Identifier: Apache-2.0
"""Random images and tokens in place of data: for benchmarks of everything but the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdengine.data.batches import Batch, Loader, check_identity, check_names
from kdengine.data.tokenize import parse_tokenizer_id
from kdengine.data.views import ViewSpec

# batches are made once and handed out in turn, so that making them costs no step any time
NUM_BATCHES = 4

# open_clip's own vocabulary: the text tower takes the token with the highest id as the end
_SIMPLE_START, _SIMPLE_END = 49406, 49407
# ids that every Hugging Face vocabulary in use has, above the special tokens
_OTHER_LOW, _OTHER_HIGH = 200, 1000


def build_synthetic_loader(
    num_samples: int,
    *,
    views: Mapping[str, ViewSpec],
    tokenizers: Mapping[str, str],
    batch_size: int,
    accum_freq: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device_id: int | None = None,
) -> Loader:
    """An endless loader of noise with the shapes of `build_loader`; nothing can be learnt from it.

    Shapes, with b = batch_size on this rank: views [b, 3, size, size] float32, normal; tokens
    [b, context] int64, random words between start and end tokens; sample [b] int64; window [b, 4].

    Args:
        num_samples: samples in an epoch of all ranks.
        views: images to make, by their name in the batch.
        tokenizers: tokenizer ids, by the name of their tokens in the batch.
        batch_size: samples on each rank.
        accum_freq: batches of a step.
        rank: number of this rank.
        world_size: number of ranks.
        seed: equal on all ranks, which still draw different noise.
        device_id: GPU that makes and holds the batches, None for the CPU.

    Memory: four batches.

    Raises:
        ValueError: num_samples is less than one global batch, or names collide.
    """
    check_names(views, tokenizers)
    global_batch = world_size * batch_size * accum_freq
    if num_samples < global_batch:
        parts = f" x {accum_freq} micro-batches" if accum_freq > 1 else ""
        raise ValueError(
            f"data.train_num_samples: expected enough for one global batch of {world_size} ranks"
            f"{parts} x {batch_size} = {global_batch}, got {num_samples}"
        )
    return SyntheticLoader(
        num_samples,
        dict(views),
        dict(tokenizers),
        (batch_size, accum_freq, rank, world_size, seed),
        torch.device("cpu" if device_id is None else f"cuda:{device_id}"),
    )


class SyntheticLoader(Loader):
    """Hands out a few random batches in turn; see `build_synthetic_loader`."""

    def __init__(
        self,
        num_samples: int,
        views: dict[str, ViewSpec],
        tokenizers: dict[str, str],
        shape: tuple[int, int, int, int, int],
        device: torch.device,
    ) -> None:
        self._views, self._tokenizers, self._device = views, tokenizers, device
        self._num_samples = num_samples
        self._batch_size, accum_freq, self._rank, self._world_size, self._seed = shape
        self.steps_per_epoch = num_samples // (self._world_size * self._batch_size * accum_freq)
        self._batches_per_epoch = self.steps_per_epoch * accum_freq
        self._batches: list[Batch] = []

    def _next(self) -> Batch:
        if not self._batches:
            generator = torch.Generator(self._device)
            generator.manual_seed(self._seed * 1_000_003 + self._rank)
            self._batches = [self._make(generator) for _ in range(NUM_BATCHES)]
        batch = dict(self._batches[self.step % NUM_BATCHES])
        first = (
            self.step % self._batches_per_epoch * self._world_size + self._rank
        ) * self._batch_size
        batch["sample"] = torch.arange(first, first + self._batch_size, device=self._device)
        self.step += 1
        return batch

    def _make(self, generator: torch.Generator) -> Batch:
        b = self._batch_size
        options: dict[str, Any] = {"generator": generator, "device": self._device}
        batch = {
            name: torch.randn(b, 3, view.size, view.size, **options)
            for name, view in self._views.items()
        }
        for name, tokenizer in self._tokenizers.items():
            kind, _, context, _ = parse_tokenizer_id(tokenizer)
            low, high = (1, _SIMPLE_START) if kind == "simple" else (_OTHER_LOW, _OTHER_HIGH)
            batch[name] = torch.randint(low, high, (b, context), **options)
            if kind == "simple":
                batch[name][:, 0], batch[name][:, -1] = _SIMPLE_START, _SIMPLE_END
        size = max(view.size for view in self._views.values())
        window = torch.tensor([0, 0, size, size], device=self._device)
        return {**batch, "window": window.repeat(b, 1)}

    def _identity(self) -> dict[str, Any]:
        return {
            "num_samples": self._num_samples,
            "rank": self._rank,
            "world_size": self._world_size,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "synthetic": True,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; see `Loader.state_dict`."""
        return {"step": self.step, "identity": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken; see `Loader.load_state_dict`."""
        check_identity(state["identity"], self._identity())
        self.step = int(state["step"])

    def close(self) -> None:
        """Free the batches."""
        self._batches = []
