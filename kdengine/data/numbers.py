# SPDX-License-Identifier: Apache-2.0
"""Global sample numbers of what DALI tells of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kdengine.data.dataset import DatasetIndex


class SourceNumbers:
    """From `tar:offset:name`, or from the path of an image of a class folder, to its number.

    Attributes:
        first: number of each archive's first sample; one that is listed twice keeps those of its
            first place.
        files: number of each image that is a file of its own.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.first: dict[str, int] = {}
        for shard in index.shards:
            self.first.setdefault(shard.tar, shard.first)
        files = [] if index.classes is None else index.files()
        self.files = {file: number for number, file in enumerate(files)}

    def one(self, source: str) -> int:
        """The number of one source (the path of an archive may have colons)."""
        if self.files:
            return self.files[source]
        tar, _, local = source.rsplit(":", 2)
        return self.first[tar] + int(local)

    def all(self, sources: Sequence[str]) -> np.ndarray:
        """The numbers of several sources, int64 [n]."""
        return np.array([self.one(source) for source in sources], np.int64)
