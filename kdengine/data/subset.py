# SPDX-License-Identifier: Apache-2.0
"""The index of some of the samples of an index, with classes of their own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdengine.data import store
from kdengine.data.build import Place
from kdengine.data.dataset import DatasetIndex
from kdengine.data.validate import GoodSample, ShardContents


def subset(
    index: DatasetIndex, numbers: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> DatasetIndex:
    """An index of these samples alone, numbered from 0 in the order of the index.

    It lies beside the index, under a name that tells which samples of what they are, and is written
    once. Its samples have no captions; nothing of it is quarantined.

    Shapes: numbers int64 [n], rising; labels int64 [n], the class of each among ``names``.

    Raises:
        RuntimeError: the folder of the index cannot be written.
    """
    digest = hashlib.sha256(np.stack([numbers, labels]).astype("<i8").tobytes())
    for shard in index.shards:
        digest.update(f"{shard.tar} {shard.content_digest()}\n".encode())
    digest.update("\n".join(names).encode())
    name = f"subset-{digest.hexdigest()[:16]}"
    keys, places = index.keys(), []
    for shard, where, local in index.by_shard(numbers):
        root = Path(shard.folder).parent
        root = root.with_name(f"{root.name}-{name}")
        place = Place(shard.tar, root / Path(shard.folder).name)
        places.append(place)
        with store.locked(root):
            if store.load_meta(place.folder) is not None:
                continue
            spans = _spans(shard.idx, shard.num_samples) if index.classes is None else None
            good = []
            for position, number in zip(where.tolist(), local.tolist(), strict=True):
                offset, size = spans[number] if spans else (0, 0)
                key, label = keys[shard.first + number], int(labels[position])
                good.append(GoodSample(key, offset, size, [], label))
            classes = None if index.classes is None else list(names)
            contents = ShardContents(good, [], None, Counter(), classes)
            store.write_shard(shard.tar, place.folder, contents, index.stamp(shard))
            store.write_root_quarantine(root)
    return DatasetIndex(places, index.stats)


def _spans(idx: str, num_samples: int) -> list[tuple[int, int]]:
    """Offset and size of each image in its archive."""
    lines = Path(idx).read_text(encoding="ascii").splitlines()[1:]
    assert len(lines) == num_samples
    found = [line.split() for line in lines]
    return [(int(offset), int(size)) for _, offset, size, _ in found]
