# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a data set, read a block at a time: a teacher cache's, or an array's.

A row stands for an image. Of a cache it is the mean over the stored crops of each image, made unit
length again; of an array, its row made unit length. The rows of a cache are numbered shard after
shard in the order of their folders' names, whatever order they were made in.

What belongs to each row is written beside the same names: ``OUT/shards/SHARD-DIGEST/NAME.npy`` in
the order of the shard's index, or ``OUT/NAME.npy`` for an array.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.cache import Manifest, TeacherEntry, codec, store
from kdengine.data.limits import MAPS


class Part(NamedTuple):
    """Rows that lie together: of one shard, or of all of an array.

    Attributes:
        folder: where results of these rows lie, below the folder of results.
        first: number of the first row.
        num_rows: rows.
    """

    folder: str
    first: int
    num_rows: int


class Embeddings(abc.ABC):
    """Unit rows, float32, numbered from 0.

    Attributes:
        num_rows: rows.
        width: of each.
        parts: the rows' places, in order.
        digest: equal for the same embeddings of the same samples.
        teacher: whose they are, where that is known.
    """

    num_rows: int
    width: int
    parts: list[Part]
    digest: str
    teacher: TeacherEntry | None = None

    @abc.abstractmethod
    def _rows(self, part: int, local: np.ndarray | slice) -> Tensor: ...

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1: [n, width] float32."""
        pieces = []
        for number in range(self._part_of(first), len(self.parts)):
            part = self.parts[number]
            if part.first >= last:
                break
            begin, end = max(first - part.first, 0), min(last - part.first, part.num_rows)
            pieces.append(self._unit(number, slice(begin, end)))
        return torch.cat(pieces) if pieces else torch.empty(0, self.width)

    def take(self, numbers: np.ndarray) -> Tensor:
        """The rows of these numbers: int64 [n] -> [n, width] float32."""
        found = torch.empty(len(numbers), self.width)
        firsts = np.array([part.first for part in self.parts])
        owner = np.searchsorted(firsts, numbers, side="right") - 1
        for number in np.unique(owner):
            where = np.flatnonzero(owner == number)
            found[where] = self._unit(int(number), numbers[where] - firsts[number])
        return found

    def _part_of(self, row: int) -> int:
        firsts = [part.first for part in self.parts]
        return max(0, int(np.searchsorted(firsts, row, side="right")) - 1)

    def _unit(self, part: int, local: np.ndarray | slice) -> Tensor:
        rows = self._rows(part, local)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        if not bool(((lengths > 0) & torch.isfinite(lengths)).all()):
            raise ValueError(
                f"embeddings: {self.parts[part].folder or 'the array'} holds rows that are not "
                "finite or have length 0; make them anew"
            )
        return F.normalize(rows, dim=1)


class ArrayEmbeddings(Embeddings):
    """The rows of a NumPy file [N, E] of floating point numbers."""

    def __init__(self, path: Path) -> None:
        try:
            self._values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"embeddings: {path} is no NumPy array: {error}") from None
        shape, dtype = self._values.shape, self._values.dtype
        if len(shape) != 2 or not all(shape) or dtype.kind != "f":
            raise ValueError(
                f"embeddings: expected rows of floating point numbers in {path}, [N, width]; got "
                f"{dtype} {list(shape)}"
            )
        self.num_rows, self.width = shape
        self.parts = [Part("", 0, self.num_rows)]
        state = path.stat()
        told = f"{shape} {dtype} {state.st_size} {state.st_mtime_ns}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def _rows(self, part: int, local: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(np.asarray(self._values[local], np.float32).copy())


class CacheEmbeddings(Embeddings):
    """The image embeddings of one teacher of a cache; every shard in it must be complete."""

    def __init__(self, path: Path, teacher: int) -> None:
        manifest = Manifest.read(path)
        if not 0 <= teacher < len(manifest.teachers):
            names = ", ".join(entry.spec.name for entry in manifest.teachers)
            raise ValueError(
                f"embeddings: teacher {teacher} came, and {path} holds {len(manifest.teachers)} "
                f"({names}), numbered from 0"
            )
        self._root, self._storage = path, manifest.storage
        self._files = {
            p: f"{store.array_name(teacher, p)}.npy" for p in codec.arrays(self._storage)
        }
        self._views = [store.view_name(view) for view in range(manifest.views)]
        self.teacher = manifest.teachers[teacher]
        self.width = self.teacher.spec.embed_dim
        self.parts, first = [], 0
        for folder in sorted(path.glob("shards/*")):
            missing = [view for view in self._views if not store.is_complete(folder, view)]
            if missing:
                raise ValueError(
                    f"embeddings: {folder} lacks {missing[0]}, so the cache is not finished; run "
                    "the 'kdengine cache' command that made it again"
                )
            rows = int(store.read_facts(folder, self._views[0])["rows"])
            self.parts.append(Part(f"shards/{folder.name}", first, rows))
            first += rows
        if not first:
            raise ValueError(f"embeddings: the cache {path} holds no shard")
        self.num_rows = first
        told = [manifest.digest, str(teacher), *(part.folder for part in self.parts)]
        self.digest = hashlib.sha256("\n".join(told).encode()).hexdigest()

    def _rows(self, part: int, local: np.ndarray | slice) -> Tensor:
        total = None
        for view in self._views:
            folder = self._root / self.parts[part].folder / view
            stored = {
                name: torch.from_numpy(_map(str(folder / file))[local].copy())
                for name, file in self._files.items()
            }
            rows = codec.decode(stored, self._storage, torch.float32)
            total = rows if total is None else total.add_(rows)
        assert total is not None
        return total


class SomeEmbeddings(Embeddings):
    """Some rows of others, by their numbers, int64 [n], rising; numbered anew."""

    def __init__(self, embeddings: Embeddings, numbers: np.ndarray) -> None:
        self._embeddings, self._numbers = embeddings, numbers
        self.num_rows, self.width = len(numbers), embeddings.width
        self.parts, self.digest = [Part("", 0, self.num_rows)], ""

    def _rows(self, part: int, local: np.ndarray | slice) -> Tensor:
        return self._embeddings.take(self._numbers[local])


def open_embeddings(path: Path, teacher: int = 0) -> Embeddings:
    """The embeddings in a file or folder.

    Args:
        path: a cache (``kdengine cache``), or a NumPy file [N, width].
        teacher: which of a cache's.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it cannot be used.
    """
    if path.is_file():
        return ArrayEmbeddings(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"embeddings: {path} does not exist; expected the folder of a cache, or a .npy file"
        )
    return CacheEmbeddings(path, teacher)


def write_parts(out: Path, embeddings: Embeddings, name: str, values: np.ndarray) -> None:
    """Write a value for each row beside the names of their samples; each file in one step."""
    PartsWriter(out, embeddings, name).append(values)


def read_parts(out: Path, embeddings: Embeddings, name: str) -> np.ndarray:
    """What `write_parts` wrote for the same embeddings."""
    files = [out / part.folder / f"{name}.npy" for part in embeddings.parts]
    return np.concatenate([np.load(file) for file in files])


class PartsWriter:
    """Writes what belongs to each row as it is found, in the order of the rows; see `write_parts`.

    Args:
        out: folder of the results.
        embeddings: whose rows.
        name: of the files.
    """

    def __init__(self, out: Path, embeddings: Embeddings, name: str) -> None:
        self._out, self._name, self._parts = out, name, iter(embeddings.parts)
        self._file: IO[bytes] | None = None
        self._left = 0

    def append(self, values: np.ndarray) -> None:
        """Write those of the next rows, [n, ...]; a file is there when its last row is."""
        values = np.ascontiguousarray(values)
        while len(values):
            if self._file is None:
                self._begin(values)
            assert self._file is not None
            some = values[: self._left]
            self._file.write(some.data)
            self._left -= len(some)
            values = values[len(some) :]
            if not self._left:
                self._file.close()
                self._file = None
                os.replace(self._folder / partial_file(self._name), self._folder / self._final)

    def _begin(self, values: np.ndarray) -> None:
        part = next(self._parts)
        self._folder, self._final = self._out / part.folder, f"{self._name}.npy"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / partial_file(self._name), "wb")  # noqa: SIM115
        header = np.lib.format.header_data_from_array_1_0(values)
        header["shape"] = (part.num_rows, *values.shape[1:])
        np.lib.format.write_array_header_1_0(self._file, header)
        self._left = part.num_rows


def partial_file(name: str) -> str:
    """The file of some results while it is written."""
    return f".{name}.partial.npy"


# every map holds a file descriptor
@functools.lru_cache(maxsize=MAPS)
def _map(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
