# SPDX-License-Identifier: Apache-2.0
"""What every loader is: an iterator of batches whose place in the data can be saved."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from typing import Any

import torch

from kdengine.data.clusters import STORED
from kdengine.data.views import ViewSpec

Batch = dict[str, torch.Tensor]

# names of a batch that no view and no token tensor may take
RESERVED = ("sample", "valid", "window", "label", *STORED)


class Loader(abc.ABC):
    """An iterator of batches, as dictionaries of tensors on one device.

    Attributes:
        steps_per_epoch: steps in a pass over the data, of `accum_freq` batches each in training and
            of one in evaluation; equal on all ranks.
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


def check_names(views: Mapping[str, ViewSpec], tokenizers: Mapping[str, str]) -> None:
    """Refuse a batch without images, or with one name for two tensors."""
    if not views:
        raise ValueError("data: expected at least one view, got none")
    names = [*views, *tokenizers, *RESERVED]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"data: the names {twice} stand for more than one tensor of a batch; "
            f"views and tokenizers need different names, and not one of {list(RESERVED)}"
        )


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError naming what differs between a saved loader and this one."""
    wrong = [
        f"{key} was {saved.get(key)}, is {own[key]}" for key in own if saved.get(key) != own[key]
    ]
    if wrong:
        raise ValueError(
            f"resume: the checkpoint's place in the data is one of other data or settings: "
            f"{'; '.join(wrong)}; resume with those of the checkpoint, or start a new run"
        )
