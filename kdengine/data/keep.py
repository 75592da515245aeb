# SPDX-License-Identifier: Apache-2.0
"""Training on a part of a data set: keep lists, as `kdengine balance` writes them.

    FOLDER/shards/SHARD-DIGEST/keep.npy    bool [n], in the order of the shard's index

DIGEST is that of the shard's good samples and captions, so a list belongs to that content wherever
the shard lies. Of a list follows an index for DALI, `images-LIST.idx` beside the shard's own, that
names the kept samples alone. Their numbers stay those of the whole shard, and so do captions,
labels and a cache of embeddings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdengine.data.results import read_manifest

if TYPE_CHECKING:
    from kdengine.data.dataset import ShardIndex

KEEP = "keep.npy"


def kept_shards(shards: Sequence[ShardIndex], folder: Path) -> tuple[tuple[ShardIndex, ...], str]:
    """The shards with indexes of what is kept, and a digest of all lists.

    Raises:
        FileNotFoundError: there is no folder, or no list for a shard.
        ValueError: a list does not fit its shard, or nothing is kept.
        RuntimeError: an index cannot be written.
    """
    if read_manifest("data.keep", folder, "balance").get("command") == "cluster":
        raise ValueError(
            f"data.keep: {folder} holds clusters; expected the folder that 'kdengine balance' wrote"
        )
    absent = [shard for shard in shards if not _path(folder, shard).is_file()]
    if absent:
        raise FileNotFoundError(
            f"data.keep: {folder} has no list for {len(absent)} of {len(shards)} shards, the first "
            f"is {absent[0].tar}; a shard with other samples or captions than when it was cached "
            "counts as another. Run 'kdengine cache' and 'kdengine balance' over this run's shards"
        )
    found, digest = [], hashlib.sha256()
    for shard in shards:
        keep = _read(_path(folder, shard), shard)
        own = hashlib.sha256(keep.tobytes()).hexdigest()
        digest.update(f"{shard.label} {own}\n".encode())
        idx = Path(shard.folder, f"images-{own[:12]}.idx")
        if not idx.is_file():
            _write(idx, Path(shard.folder, "images.idx"), keep)
        found.append(dataclasses.replace(shard, idx=str(idx), num_read=int(keep.sum())))
    if not any(shard.num_read for shard in found):
        raise ValueError(f"data.keep: {folder} keeps none of this run's samples")
    return tuple(found), digest.hexdigest()


def _path(folder: Path, shard: ShardIndex) -> Path:
    return folder / "shards" / shard.label / KEEP


def _read(path: Path, shard: ShardIndex) -> np.ndarray:
    try:
        keep = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"data.keep: {path} is no list: {error}; make it anew") from None
    if keep.dtype != bool or keep.shape != (shard.num_samples,):
        raise ValueError(
            f"data.keep: expected a yes or no for each of {shard.num_samples} samples in {path}, "
            f"got {keep.dtype} {list(keep.shape)}; make it anew"
        )
    return keep


def _write(idx: Path, whole: Path, keep: np.ndarray) -> None:
    """The lines of the kept samples, in one step."""
    _, *lines = whole.read_text("ascii").splitlines(keepends=True)
    chosen = [line for line, stays in zip(lines, keep.tolist(), strict=True) if stays]
    partial = idx.with_name(f"{idx.name}.{os.getpid()}")
    try:
        partial.write_text("".join([f"v1.2 {len(chosen)}\n", *chosen]), "ascii")
        partial.replace(idx)
    except OSError as error:
        raise RuntimeError(
            f"data.keep: the index of what is kept must be written beside {whole}, which is not "
            f"possible ({error}); name a folder that can be written with --data.index-dir"
        ) from error
