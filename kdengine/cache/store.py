# SPDX-License-Identifier: Apache-2.0
"""A cache on disk: written unit by unit, each complete or absent, and read by memory map.

    OUT/manifest.json                     teachers, views, storage, crops: equal for all files
    OUT/shards/SHARD-DIGEST/view-V/       of every sample in the order of the index
        windows.npy                         int32 [n, 4]: top, left, height, width of the crop
        teacher-K.npy                       image embeddings [n, E_K]
        teacher-K-scale.npy                 float32 [n], for int8
        unit.json                           rows, bytes, checksums, error of the storage
    OUT/shards/SHARD-DIGEST/text/         of every caption in the order of the index
        teacher-K.npy, ...                  text embeddings [c, E_K]

DIGEST is that of the shard's index (its samples, their places and captions), so shards may be
renamed folders away, and one whose content changed is another shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdengine.cache import codec
from kdengine.cache.manifest import Manifest
from kdengine.data import DatasetIndex, ShardIndex
from kdengine.data.limits import MAPS
from kdengine.data.progress import counted
from kdengine.durable import sync_tree

TEXT, WINDOWS, UNIT, PARTIAL = "text", "windows", "unit.json", ".partial-"


def view_name(view: int) -> str:
    """The unit of one view."""
    return f"view-{view}"


def array_name(teacher: int, part: str) -> str:
    """The file of one array of a teacher's embeddings, without its ending."""
    return f"teacher-{teacher}{part}"


def shard_folder(root: Path, shard: ShardIndex) -> Path:
    """Where the units of a shard lie."""
    return root / "shards" / shard.label


def is_complete(folder: Path, unit: str) -> bool:
    """Whether a unit of a shard is there with all its bytes.

    It is renamed into place when it is written and on the disk; a copy of it may have stopped.
    """
    try:
        size = read_facts(folder, unit)["bytes"]
        return size == sum(file.stat().st_size for file in (folder / unit).glob("*.npy"))
    except (OSError, ValueError, KeyError):
        return False


def write_unit(
    folder: Path, unit: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Write the arrays of a unit and what is to be known of it, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{PARTIAL}{unit}"
    # what an interrupted command has left, here and in the unit's place
    for leftover in (scratch, folder / unit):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir()
    for name, values in arrays.items():
        np.save(scratch / f"{name}.npy", values)
    size = sum(file.stat().st_size for file in scratch.iterdir())
    digests = {f"{name}.npy": _digest(values) for name, values in arrays.items()}
    told = {"bytes": size, "sha256": digests, **facts}
    (scratch / UNIT).write_text(json.dumps(told) + "\n", encoding="utf-8")
    sync_tree(scratch)
    scratch.rename(folder / unit)


def units(manifest: Manifest) -> list[str]:
    """The units of every shard."""
    return [TEXT, *map(view_name, range(manifest.views))]


def read_facts(folder: Path, unit: str) -> dict[str, Any]:
    """What `write_unit` was told of a unit, and its size in bytes."""
    return json.loads((folder / unit / UNIT).read_text(encoding="utf-8"))


class Store:
    """A cache opened for training: the `Replay` of a loader, once it has met the loader's index.

    Args:
        path: folder of the cache.
        with_rows: hand out embeddings beside the windows.

    Attributes:
        manifest: what it holds.
        num_views: views of a sample.
        digest: of the manifest and of the shards of the run.

    Raises:
        FileNotFoundError, ValueError: see `Manifest.read`.
    """

    def __init__(self, path: str | Path, *, with_rows: bool = True) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.num_views = self.manifest.views
        self.digest = self.manifest.digest
        parts = codec.arrays(self.manifest.storage)
        numbers = range(len(self.manifest.teachers))
        names = [f"{array_name(teacher, part)}.npy" for teacher in numbers for part in parts]
        self._array_names = names if with_rows else []
        self._index: DatasetIndex | None = None

    def check(self, index: DatasetIndex) -> None:
        """See that every file for an index is there, with all its bytes.

        Raises:
            ValueError: a shard is not in the cache, or its part was not finished; the message
                counts and names them.
        """
        absent, unfinished = [], []
        for shard in unique_shards(index):
            folder = shard_folder(self.path, shard)
            missing = [unit for unit in units(self.manifest) if not is_complete(folder, unit)]
            if not folder.is_dir():
                absent.append(shard.tar)
            elif missing:
                unfinished.append(shard.tar)
        if absent:
            known = sorted(p.name for p in self.path.glob("shards/*"))
            raise ValueError(
                f"cache: {self.path} lacks {counted(len(absent), 'shard')} of this run, the first "
                f"is {absent[0]}; it holds {counted(len(known), 'shard')}, a shard with other "
                "samples or captions than when it was cached counts as another; add what is "
                "missing with the 'kdengine cache' command that made it, over the run's shards"
            )
        if unfinished:
            raise ValueError(
                f"cache: {self.path} is not finished for {counted(len(unfinished), 'shard')} of "
                f"this run, or was cut short since, the first is {unfinished[0]}; run the "
                "'kdengine cache' command that made it again: it makes what is missing"
            )

    def attach(self, index: DatasetIndex) -> None:
        """Serve the samples of an index; see `Replay.attach`."""
        self._index = index
        digests = "".join(shard.content_digest() for shard in index.shards)
        self.digest = hashlib.sha256((self.manifest.digest + digests).encode()).hexdigest()

    def windows(self, numbers: np.ndarray, views: np.ndarray) -> np.ndarray:
        """See `Replay.windows`."""
        found = np.empty((len(numbers), 4), np.int64)
        for folder, where, local in self._by_shard(numbers):
            for view, some in _groups(views[where]):
                rows = local[some]
                found[where[some]] = _map(str(folder / view_name(view) / f"{WINDOWS}.npy"))[rows]
                for name in self._array_names:
                    # opened here, batches before `rows` wants it: the disk is asked meanwhile
                    _map(str(folder / view_name(view) / name))
            for name in self._array_names:
                _map(str(folder / TEXT / name))
        return found

    def rows(
        self, numbers: np.ndarray, views: np.ndarray, captions: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The stored embeddings of every teacher, by `key`; see `Replay.rows`."""
        if not self._array_names:
            return {}
        assert self._index is not None
        found: dict[str, torch.Tensor] = {}
        first = self._index.first_captions(numbers)
        places = [
            (folder, where, local, [(view_name(v), some) for v, some in _groups(views[where])])
            for folder, where, local in self._by_shard(numbers)
        ]
        for teacher in range(len(self.manifest.teachers)):
            for part in codec.arrays(self.manifest.storage):
                file = f"{array_name(teacher, part)}.npy"
                image, text = [], []
                for folder, where, local, view_groups in places:
                    for unit, some in view_groups:
                        image.append((where[some], folder / unit / file, local[some]))
                    text.append((where, folder / TEXT / file, first[where] + captions[where]))
                found[key(teacher, "image", part)] = _gather(image, len(numbers))
                found[key(teacher, "text", part)] = _gather(text, len(numbers))
        return found

    def _by_shard(self, numbers: np.ndarray) -> Iterable[tuple[Path, np.ndarray, np.ndarray]]:
        assert self._index is not None
        for shard, where, local in self._index.by_shard(numbers):
            yield shard_folder(self.path, shard), where, local


def key(teacher: int, modality: str, part: str) -> str:
    """The name in a batch of one stored array: modality is image or text."""
    return f"cached_{modality}_{teacher}{part}"


def unique_shards(index: DatasetIndex) -> list[ShardIndex]:
    """The shards of an index; those of equal name and content, from whatever folder, once."""
    known = {shard_folder(Path(), shard): shard for shard in reversed(index.shards)}
    return list(known.values())[::-1]


def _groups(values: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Each value, and where it stands."""
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


def _gather(places: list[tuple[np.ndarray, Path, np.ndarray]], count: int) -> torch.Tensor:
    """Rows of several files as one tensor: (positions in it, file, rows of the file)."""
    sample = _map(str(places[0][1]))
    found = np.empty((count, *sample.shape[1:]), sample.dtype)
    for where, file, rows in places:
        found[where] = _map(str(file))[rows]
    return torch.from_numpy(found)


# a batch comes from few shards at a time; every map holds a file descriptor
@functools.lru_cache(maxsize=MAPS)
def _map(path: str) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise RuntimeError(f"cache: {path} cannot be read: {error}") from error
    # in the data pipeline's thread: this also reads ahead while earlier batches train
    unit = Path(path).parent
    if _digest(found) != read_facts(unit.parent, unit.name)["sha256"][Path(path).name]:
        raise RuntimeError(
            f"cache: {path} is damaged, it is not what was written; remove the folder {unit} and "
            "run the 'kdengine cache' command that made it again"
        )
    return found


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
