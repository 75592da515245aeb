# SPDX-License-Identifier: Apache-2.0
"""What a loader asks of a store of views: their windows, and what else is stored with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from kdengine.data.dataset import DatasetIndex


class Replay(Protocol):
    """Stored views of every sample of an index, by its global sample numbers.

    Attributes:
        num_views: stored views of a sample.
        digest: changes with what is stored; a loader's position belongs to one digest.
    """

    num_views: int
    digest: str

    def check(self, index: DatasetIndex) -> None:
        """See that all of an index is stored.

        Raises:
            ValueError: something is not; the message names it.
        """
        ...

    def attach(self, index: DatasetIndex) -> None:
        """Serve the samples of an index that was checked, on this rank or another."""
        ...

    def windows(self, numbers: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Windows (top, left, height, width) of views of samples: int64 [n], [n] -> [n, 4].

        Called in a thread of the data pipeline, batches ahead of training.
        """
        ...

    def rows(
        self, numbers: np.ndarray, views: np.ndarray, captions: np.ndarray
    ) -> Mapping[str, torch.Tensor]:
        """More tensors of a batch, [n, ...] on the CPU, by their names.

        Args:
            numbers: samples, int64 [n].
            views: which view of each, int64 [n].
            captions: which caption of each, int64 [n].
        """
        ...
