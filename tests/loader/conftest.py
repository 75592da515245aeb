# SPDX-License-Identifier: Apache-2.0
"""Hand-written indexes for the loaders: tokens say which caption of which sample they are."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kdengine.data import Loader, ViewSpec, build_loader

NUM_CAPTIONS = 5
VIEW = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass
class Shard:
    tar: str
    idx: str
    num_samples: int
    first: int
    num_read: int | None = None


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
    quarantine_paths = ("/q",)
    classes = kept = None

    def __init__(self, shards: list[tuple[str, str, int]]) -> None:
        firsts = np.cumsum([0] + [shard[2] for shard in shards]).tolist()
        self.shards = tuple(Shard(*s, first) for s, first in zip(shards, firsts, strict=False))
        self.num_samples = self.num_read = firsts[-1]

    def captions(self, tokenizer_id: str) -> Table:
        return Table(len(tokenizer_id))

    def summary(self) -> dict[str, object]:
        return {"samples": 3, "causes": {"image-decode": 3}, "archives": {}, "notes": {}}

    def key(self, number: int) -> str:
        return f"key-{number}"


@pytest.fixture(scope="session")
def write_index() -> Callable[[Path, Path, list[int]], tuple[str, str, int]]:
    """``write_index(tar, idx, numbers)``: a v1.2 index of some of an archive's images."""

    def write(tar: Path, idx: Path, names: list[int]) -> tuple[str, str, int]:
        with tarfile.open(tar) as archive:
            images = [m for m in archive if m.name.endswith(".jpg")]
        lines = [f"img {images[n].offset_data} {images[n].size} {n}" for n in names]
        idx.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
        return str(tar), str(idx), len(lines)

    return write


@pytest.fixture
def shards(test_data: Path, tmp_path: Path, write_index) -> list[tuple[str, str, int]]:
    """Three shards of 17, 20 and 16 samples."""
    return [
        write_index(
            test_data / f"flickr8k-train-00{i}.tar", tmp_path / f"{i}.idx", list(range(num))
        )
        for i, num in enumerate((17, 20, 16))
    ]


@pytest.fixture(scope="session")
def make() -> Callable[..., Loader]:
    """``make(shards, ...)``: a loader of 32-pixel images in batches of 6."""

    def build(shards: list[tuple[str, str, int]], **options) -> Loader:
        defaults = {
            "views": {"image": VIEW},
            "tokenizers": {"tokens": "simple:77"},
            "batch_size": 6,
            "num_threads": 1,
            "seed": 7,
        }
        return build_loader(Index(shards), **{**defaults, **options})

    return build
