# SPDX-License-Identifier: Apache-2.0
"""An index opened for reading: numbered samples, their captions, token ids, labels and keys."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdengine.data.build import BuildStats, Place
from kdengine.data.limits import MAPS
from kdengine.data.store import (
    CAPTION_FIRST,
    KEY_START,
    LABEL,
    QUARANTINE,
    content_digest,
    load_meta,
)
from kdengine.data.tokenize import parse_tokenizer_id


@dataclass(frozen=True)
class ShardIndex:
    """One shard with at least one good sample; a shard listed twice appears twice.

    Attributes:
        tar: absolute path of the archive, or of a folder of class folders.
        idx: path of our DALI v1.2 index: component `img`, name field = number of the sample in the
            shard, from 0 to num_samples - 1. A folder has none.
        num_samples: good samples.
        first: global number of the first of them; global number = first + number in the shard.
        folder: the index folder of the shard.
        generation: changes when the index is rebuilt.
        content: see `content_digest`, where it is known.
        num_read: samples that `idx` lists, where `keep` has left some out; None is all.
    """

    tar: str
    idx: str
    num_samples: int
    first: int
    folder: str
    generation: str
    content: str | None = None
    num_read: int | None = None

    @property
    def label(self) -> str:
        """Name and content of the shard, for files about its samples wherever it lies."""
        return f"{os.path.basename(self.tar)}-{self.content_digest()[:12]}"

    def content_digest(self) -> str:
        """Equal for shards with the same good samples at the same places and equal captions."""
        # an index that is older than the digest lacks it
        return self.content or _computed_digest(self.folder, self.generation)


class DatasetIndex:
    """Good samples of a list of shards, numbered from 0 in the order of the list.

    Cheap to make and to pickle: the files are mapped into memory on first use.

    Attributes:
        shards: those with at least one good sample.
        num_listed: shards that were asked for, those without a good sample included.
        num_samples: good samples, over all shards as often as they are listed.
        classes: names of the class folders, sorted as text, where the data is a folder of them;
            else None.
        num_quarantined: bad samples, likewise; good and bad together are all samples.
        quarantine_paths: the `quarantine.jsonl` files that name the bad ones.
        stats: what it took to bring the index up to date.
        kept: digest of the lists that `keep` was given; None without.
    """

    def __init__(self, places: Sequence[Place], stats: BuildStats) -> None:
        self.stats = stats
        self._metas = [_open_meta(place) for place in places]
        shards, first = [], 0
        for place, meta in zip(places, self._metas, strict=True):
            if meta["num_samples"]:
                shards.append(_shard_index(place, meta, first))
                first += meta["num_samples"]
        self.shards: tuple[ShardIndex, ...] = tuple(shards)
        self.num_listed = len(self._metas)
        names = self._metas[0].get("classes")
        self.classes: tuple[str, ...] | None = None if names is None else tuple(names)
        self.num_samples: int = first
        self.kept: str | None = None
        self.num_quarantined: int = sum(meta["num_quarantined"] for meta in self._metas)
        roots = dict.fromkeys(place.folder.parent for place in places)
        self.quarantine_paths = tuple(str(root / QUARANTINE) for root in roots)
        self._firsts = np.array([shard.first for shard in shards], np.int64)

    def captions(self, tokenizer_id: str) -> CaptionTable:
        """The token ids for one of the tokenizers that were given to `ensure_index`.

        Raises:
            KeyError: the captions were not tokenised with it.
        """
        files = []
        for meta in self._metas:
            if meta["num_samples"]:
                entry = meta["tokens"].get(tokenizer_id)
                if entry is None and meta["num_captions"]:
                    raise KeyError(
                        f"index: the captions of {meta['shard']} were not "
                        f"tokenised with {tokenizer_id!r}, only with {sorted(meta['tokens'])}; "
                        "name it in --tokenizers (ensure_index(tokenizers=...))"
                    )
                files.append("" if entry is None else entry["file"])
        return CaptionTable(self, tokenizer_id, tuple(files))

    def num_captions(self, numbers: np.ndarray) -> np.ndarray:
        """Captions of each sample: global numbers int64 [n] -> int64 [n]."""
        counts = np.empty(len(numbers), np.int64)
        for shard, where, local in self.by_shard(numbers):
            first = _samples(shard)[:, CAPTION_FIRST]
            counts[where] = first[local + 1] - first[local]
        return counts

    def texts(self, numbers: np.ndarray) -> list[list[str]]:
        """The different captions of each sample as strings, the one of its `.txt` first."""
        found: list[list[str]] = [[] for _ in range(len(numbers))]
        for shard, where, local in self.by_shard(numbers):
            first = _samples(shard)[:, CAPTION_FIRST]
            starts = _map(shard.folder, "captions.npy", shard.generation)
            text = _map(shard.folder, "captions.bin", shard.generation)
            for position, number in zip(where, local, strict=True):
                found[position] = [
                    bytes(text[starts[row] : starts[row + 1]]).decode()
                    for row in range(first[number], first[number + 1])
                ]
        return found

    def first_captions(self, numbers: np.ndarray) -> np.ndarray:
        """Number, within its shard, of the first caption of each sample: int64 [n] -> int64 [n]."""
        found = np.empty(len(numbers), np.int64)
        for shard, where, local in self.by_shard(numbers):
            found[where] = _samples(shard)[local, CAPTION_FIRST]
        return found

    def only(self, shard: ShardIndex) -> DatasetIndex:
        """The index of one of the shards alone, numbered from 0."""
        return DatasetIndex([Place(shard.tar, Path(shard.folder))], self.stats)

    @property
    def num_read(self) -> int:
        """Samples that training reads: all, or those that were kept."""
        reads = ((shard.num_samples, shard.num_read) for shard in self.shards)
        return sum(total if some is None else some for total, some in reads)

    def keep(self, folder: str | Path) -> DatasetIndex:
        """The same index, numbered as before, of which training reads a part only.

        See `kdengine.data.keep`.
        """
        from kdengine.data.keep import kept_shards

        found = copy.copy(self)
        found.shards, found.kept = kept_shards(self.shards, Path(folder))
        return found

    def stamp(self, shard: ShardIndex) -> dict[str, Any]:
        """What the index of one of the shards depends on."""
        return next(meta["stamp"] for meta in self._metas if meta["shard"] == shard.tar)

    def labels(self) -> np.ndarray:
        """Class of every sample from its `.cls` member, int64 [num_samples]; -1 where none.

        In a folder it is the number of its class folder in `classes`, which is an order of names
        and says nothing about the classes of a model.
        """
        parts = [_samples(shard)[:-1, LABEL] for shard in self.shards]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def image_bytes(self, number: int) -> bytes:
        """The encoded image of a sample of an archive."""
        [(shard, _, local)] = self.by_shard(np.array([number], np.int64))
        # not the part of it that is kept
        with open(Path(shard.folder, "images.idx"), encoding="ascii") as file:
            line = next(itertools.islice(file, int(local[0]) + 1, None))
        _, offset, size, _ = line.split()
        with open(shard.tar, "rb") as archive:
            archive.seek(int(offset))
            return archive.read(int(size))

    def key(self, number: int) -> str:
        """Key of the sample with this global number."""
        [(shard, _, local)] = self.by_shard(np.array([number], np.int64))
        start, end = _samples(shard)[local[0] : local[0] + 2, KEY_START]
        keys = _map(shard.folder, "keys.bin", shard.generation)
        return bytes(keys[start:end]).decode("utf-8", "surrogateescape")

    def keys(self) -> list[str]:
        """Keys of all samples, in their order."""
        found: list[str] = []
        for shard in self.shards:
            starts = _samples(shard)[:, KEY_START].tolist()
            text = bytes(_map(shard.folder, "keys.bin", shard.generation))
            pairs = zip(starts[:-1], starts[1:], strict=True)
            found += [text[begin:end].decode("utf-8", "surrogateescape") for begin, end in pairs]
        return found

    def files(self) -> list[str]:
        """Path of every image of a folder, in the order of the samples; [] for shards."""
        if self.classes is None or not self.shards:
            return []
        return [f"{self.shards[0].tar}/{key}" for key in self.keys()]

    def by_shard(self, numbers: np.ndarray) -> Iterator[tuple[ShardIndex, np.ndarray, np.ndarray]]:
        """Group global numbers: (shard, their positions in the argument, numbers in the shard).

        Raises:
            IndexError: a number is not that of a sample.
        """
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_samples:
            raise IndexError(
                f"index: sample numbers lie in [0, {self.num_samples}); got "
                f"{numbers.min()} to {numbers.max()}"
            )
        owner = np.searchsorted(self._firsts, numbers, side="right") - 1
        for position in np.unique(owner):
            where = np.flatnonzero(owner == position)
            shard = self.shards[position]
            yield shard, where, numbers[where] - shard.first

    def summary(self) -> dict[str, Any]:
        """Counts, by what they count.

        Returns:
            `samples` = `kept` + `quarantined`, `captions`, `shards`, `shards_used`; `causes` and
            `archives`: dicts from cause to count; `notes`: ignored members and the like.
        """
        causes: Counter[str] = Counter()
        archives: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        for meta in self._metas:
            causes.update(meta["causes"])
            notes.update(meta["notes"])
            if meta["fault"]:
                archives[meta["fault"][0]] += 1
        return {
            "samples": self.num_samples + self.num_quarantined,
            "kept": self.num_samples,
            "quarantined": self.num_quarantined,
            "captions": sum(meta["num_captions"] for meta in self._metas),
            "shards": len(self._metas),
            "shards_used": len(self.shards),
            "causes": dict(causes),
            "archives": dict(archives),
            "notes": dict(notes),
        }


class CaptionTable:
    """Token ids of every caption for one tokenizer, mapped into memory on first use."""

    def __init__(self, index: DatasetIndex, tokenizer_id: str, files: tuple[str, ...]) -> None:
        self.tokenizer_id = tokenizer_id
        self._index = index
        self._files = {
            (shard.folder, shard.generation): file
            for shard, file in zip(index.shards, files, strict=True)
        }

    @functools.cached_property
    def context_length(self) -> int:
        """Tokens a caption."""
        return parse_tokenizer_id(self.tokenizer_id)[2]

    def num_captions(self, numbers: np.ndarray) -> np.ndarray:
        """Captions of each sample: global numbers int64 [n] -> int64 [n]."""
        return self._index.num_captions(numbers)

    def tokens(self, numbers: np.ndarray, choice: np.ndarray | None = None) -> np.ndarray:
        """Token ids of one caption of each sample.

        Args:
            numbers: global sample numbers, int64 [n].
            choice: which of the sample's captions, int64 [n]; None is the first of each.

        Returns:
            int32 [n, context_length].

        Raises:
            IndexError: a sample has no caption of that number.
        """
        ids = np.empty((len(numbers), self.context_length), np.int32)
        for shard, where, local in self._index.by_shard(numbers):
            first = _samples(shard)[:, CAPTION_FIRST]
            rows = first[local] + (0 if choice is None else np.asarray(choice)[where])
            if np.any(rows < first[local]) or np.any(rows >= first[local + 1]):
                raise IndexError(
                    f"index: a caption of {shard.tar} was asked for that its sample "
                    "has not; draw below num_captions()"
                )
            file = self._files[shard.folder, shard.generation]
            ids[where] = _map(shard.folder, file, shard.generation)[rows]
        return ids


def _open_meta(place: Place) -> dict[str, Any]:
    meta = load_meta(place.folder)
    if meta is None:
        raise RuntimeError(
            f"index: that of {place.shard} in {place.folder} is gone or incomplete; "
            "another process may be rebuilding it. Try again"
        )
    return meta


def _shard_index(place: Place, meta: dict[str, Any], first: int) -> ShardIndex:
    return ShardIndex(
        tar=place.shard,
        idx=str(place.folder / "images.idx"),
        num_samples=meta["num_samples"],
        first=first,
        folder=str(place.folder),
        generation=meta["generation"],
        content=meta.get("content"),
    )


def _samples(shard: ShardIndex) -> np.ndarray:
    return _map(shard.folder, "samples.npy", shard.generation)


@functools.cache
def _computed_digest(folder: str, generation: str) -> str:
    return content_digest(Path(folder))


# a training batch comes from few shards at a time; the bound keeps the number of maps in check
@functools.lru_cache(maxsize=MAPS)
def _map(folder: str, name: str, generation: str) -> np.ndarray:
    """Map a file of a shard's index, making sure that it is the one that was opened."""
    meta = load_meta(Path(folder))
    if meta is None or meta["generation"] != generation:
        raise RuntimeError(
            f"index: {folder} was rebuilt or removed while it was in use; start again"
        )
    if name.endswith(".npy"):
        return np.load(Path(folder, name), mmap_mode="r")
    # an empty file cannot be mapped
    size = meta["files"][name]
    return np.memmap(Path(folder, name), np.uint8, "r") if size else np.empty(0, np.uint8)
