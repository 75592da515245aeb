# SPDX-License-Identifier: Apache-2.0
"""Clusters of a data set for its batches, as `kdengine cluster` writes them.

    FOLDER/manifest.json                      their number, width, what is stored of each sample
    FOLDER/shards/SHARD-DIGEST/labels.npy     int32 [n], in the order of the shard's index
    FOLDER/shards/SHARD-DIGEST/nearest.npy    int32 [n, m], the m nearest clusters, nearest first
    FOLDER/shards/SHARD-DIGEST/cosines.npy    float32 [n, m], the sample's with their centroids
    FOLDER/shards/SHARD-DIGEST/lse.npy        float32 [n], log-sum-exp of `scale * cosine` over all

DIGEST is that of the shard's good samples and captions, so what is stored belongs to that content
wherever the shard lies.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kdengine.data.limits import MAPS
from kdengine.data.results import read_manifest

if TYPE_CHECKING:
    from kdengine.data.dataset import DatasetIndex, ShardIndex


class Stored(NamedTuple):
    """A tensor of a batch: its file, the type there and in the batch, and if it is of each of m."""

    file: str
    dtype: type[np.generic]
    in_batch: type[np.generic]
    of_each: bool


# what comes after the first is of the teacher
STORED = {
    "cluster": Stored("labels.npy", np.int32, np.int64, False),
    "cluster_nearest": Stored("nearest.npy", np.int32, np.int64, True),
    "cluster_cosine": Stored("cosines.npy", np.float32, np.float32, True),
    "cluster_lse": Stored("lse.npy", np.float32, np.float32, False),
}


class ClusterRows:
    """The cluster of every sample of an index, and the teacher's softmax over clusters.

    Args:
        folder: what `kdengine cluster` wrote over a cache.
        with_targets: read the teacher's softmax beside the labels.

    Attributes:
        num_clusters: clusters; labels lie in [0, num_clusters).
        top: clusters that are stored of each sample's softmax; 0 without targets.
        scale: of that softmax.
        width: of the centroids.
        digest: changes with labels, centroids, top and scale.
        is_kept: whether centroids are of some of the samples only.
        teacher: whose embeddings were clustered, as a cache tells its teachers; None of an array.

    Raises:
        FileNotFoundError: there is no folder, or it is not finished.
        ValueError: it holds something else, or no targets though they are wanted.
    """

    def __init__(self, folder: str | Path, *, with_targets: bool) -> None:
        self.folder = Path(folder)
        told = _told(self.folder)
        self.num_clusters, self.width = int(told["k"]), int(told["width"])
        self.scale, self.digest = float(told["scale"]), str(told["digest"])
        self.is_kept = told.get("num_kept", 0) < told.get("num_rows", 0)
        self.teacher: dict[str, Any] | None = told.get("teacher")
        self.top = int(told["top"]) if with_targets else 0
        if with_targets and not self.top:
            raise ValueError(
                f"clusters: {self.folder} has labels alone, and the teacher's softmax is wanted; "
                "run 'kdengine cluster' into another folder with a --top above 0"
            )
        self._stored = STORED if with_targets else {"cluster": STORED["cluster"]}
        self._index: DatasetIndex | None = None

    def centroids(self) -> torch.Tensor:
        """Of all clusters, unit rows, float32 [num_clusters, width], mapped from their file.

        Raises:
            ValueError: the file is damaged, or of other clusters.
        """
        path, shape = self.folder / "centroids.npy", (self.num_clusters, self.width)
        try:
            # a map that takes writes to itself, as tensors are expected to
            found = np.load(path, mmap_mode="c")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"clusters: {path} cannot be read: {error}; make it anew") from None
        if found.dtype != np.float32 or found.shape != shape:
            raise ValueError(
                f"clusters: expected float32 {list(shape)} in {path}, got {found.dtype} "
                f"{list(found.shape)}; make it anew"
            )
        return torch.from_numpy(found)

    def check(self, index: DatasetIndex) -> None:
        """See that all samples of an index have what is wanted; reads every label.

        Raises:
            FileNotFoundError: a shard is not there.
            ValueError: a file does not fit its shard, or holds numbers of no cluster.
        """
        shards = {shard.label: shard for shard in index.shards}
        absent = [
            shard.tar
            for shard in shards.values()
            if not all(self._path(shard, stored).is_file() for stored in self._stored.values())
        ]
        if absent:
            raise FileNotFoundError(
                f"clusters: {self.folder} has no clusters for {len(absent)} of {len(shards)} "
                f"shards, the first is {absent[0]}; a shard with other samples or captions than "
                "when it was cached counts as another. Run 'kdengine cache' and 'kdengine cluster' "
                "over this run's shards"
            )
        for shard in shards.values():
            for name, stored in self._stored.items():
                self._check_file(shard, name, stored)

    def _check_file(self, shard: ShardIndex, name: str, stored: Stored) -> None:
        path, shape = self._path(shard, stored), self._shape(shard.num_samples, stored)
        try:
            found = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"clusters: {path} is no array: {error}; make it anew") from None
        if found.dtype != stored.dtype or found.shape != shape:
            raise ValueError(
                f"clusters: expected {np.dtype(stored.dtype)} {list(shape)} for "
                f"{shard.num_samples} samples in {path}, got {found.dtype} {list(found.shape)}; "
                "make it anew"
            )
        if name == "cluster" and not 0 <= found.min() <= found.max() < self.num_clusters:
            raise ValueError(
                f"clusters: expected labels from 0 to {self.num_clusters - 1} in {path}, got "
                f"{found.min()} to {found.max()}; make it anew"
            )

    def attach(self, index: DatasetIndex) -> None:
        """Serve the samples of an index that was checked, on this rank or another."""
        self._index = index

    def rows(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """What is stored of samples, on the CPU.

        Shapes, of n samples: `cluster` int64 [n]; with targets `cluster_nearest` int64 [n, top],
        `cluster_cosine` float32 [n, top] and `cluster_lse` float32 [n].

        Args:
            numbers: global sample numbers, int64 [n].
        """
        assert self._index is not None, "attach an index first"
        places = list(self._index.by_shard(numbers))
        found = {}
        for name, stored in self._stored.items():
            values = np.empty(self._shape(len(numbers), stored), stored.in_batch)
            for shard, where, local in places:
                values[where] = _map(str(self._path(shard, stored)))[local]
            found[name] = torch.from_numpy(values)
        return found

    def _path(self, shard: ShardIndex, stored: Stored) -> Path:
        return self.folder / "shards" / shard.label / stored.file

    def _shape(self, num_samples: int, stored: Stored) -> tuple[int, ...]:
        return (num_samples, self.top) if stored.of_each else (num_samples,)


def _told(folder: Path) -> dict[str, Any]:
    told = read_manifest("clusters", folder, "cluster")
    if told.get("command") != "cluster":
        raise ValueError(
            f"clusters: {folder} is no result of 'kdengine cluster'; expected what that wrote"
        )
    absent = {"k", "width", "top", "scale", "digest"} - set(told)
    if absent:
        raise ValueError(
            f"clusters: {folder}/manifest.json lacks {sorted(absent)}, it is of another version; "
            "make it anew"
        )
    return told


# a batch comes from few shards at a time; every map holds a file descriptor
@functools.lru_cache(maxsize=MAPS)
def _map(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise RuntimeError(
            f"clusters: {path} cannot be read: {error}; has the folder been changed or removed "
            "meanwhile?"
        ) from error
