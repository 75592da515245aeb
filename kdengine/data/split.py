# SPDX-License-Identifier: Apache-2.0
"""Split files: which images train, validate and test, of which classes, in the format of CoOp.

    {"train": [["face/image_0001.jpg", 0, "face"], ...], "val": [...], "test": [...]}

An image is the path of a file below the folder of the data, or the key of a sample of shards, with
or without an ending. Class numbers run from 0; their names stand beside them. The first half of the
numbers, rounded up, are the base classes of the base-to-novel protocol, the others the novel ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from kdengine.data.dataset import DatasetIndex

PARTS = ("train", "val", "test")
HALVES = ("all", "base", "novel")


class Listed(NamedTuple):
    """An image of a list and the number of its class."""

    image: str
    label: int


class Split(NamedTuple):
    """Names of the classes by number, and the lists by ``PARTS``."""

    classes: list[str]
    parts: dict[str, list[Listed]]


class Chosen(NamedTuple):
    """Samples of an index: their numbers and classes, and listed images that it has not."""

    numbers: np.ndarray
    labels: np.ndarray
    lacking: list[str]


def read_split(path: str) -> Split:
    """Read and check a split file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of the format, a class has two names or none, or an image is listed
            twice.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"split {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"split {path}: not valid JSON: {error}") from None
    names: dict[int, str] = {}
    parts: dict[str, list[Listed]] = {}
    for part in PARTS:
        rows = values.get(part) if isinstance(values, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"split {path}: expected the lists {', '.join(PARTS)}; {part} is none")
        for row in rows:
            if not _is_row(row):
                raise ValueError(
                    f"split {path}: {part}: expected [image, class number, class name], got {row!r}"
                )
            image, label, name = row
            if names.setdefault(label, name) != name:
                raise ValueError(
                    f"split {path}: class {label} is called {names[label]!r} and {name!r}"
                )
            parts.setdefault(part, []).append(Listed(image, label))
    if not parts.get("train"):
        raise ValueError(f"split {path}: there is no image to train on")
    if missing := sorted(set(range(max(names) + 1)) - set(names)):
        raise ValueError(
            f"split {path}: class numbers run from 0 without a gap; class {missing[0]} has no image"
        )
    images = [item.image for items in parts.values() for item in items]
    if twice := [image for image, count in Counter(images).items() if count > 1]:
        raise ValueError(f"split {path}: {twice[0]!r} is listed twice ({len(twice)} images are)")
    return Split([names[n] for n in range(len(names))], {p: parts.get(p, []) for p in PARTS})


def half(num_classes: int, which: str) -> range:
    """Class numbers of ``all``, of the ``base`` half (rounded up), or of the ``novel`` one."""
    middle = math.ceil(num_classes / 2)
    halves = {"all": (0, num_classes), "base": (0, middle), "novel": (middle, num_classes)}
    return range(*halves[which])


def few_shots(items: Sequence[Listed], shots: int, seed: int) -> list[Listed]:
    """``shots`` images of each class, all of a class that has fewer; 0 takes all.

    Drawn from (seed, image) alone: neither the order of the list nor other images matter, and
    fewer shots are some of more. Not the images that CoOp's own generator draws with that seed.
    """
    if not shots:
        return list(items)
    by_class: dict[int, list[Listed]] = {}
    for item in sorted(items, key=lambda item: _noise(seed, item.image)):
        by_class.setdefault(item.label, []).append(item)
    kept = {item for own in by_class.values() for item in own[:shots]}
    return [item for item in items if item in kept]


def choose(index: DatasetIndex, items: Sequence[Listed], source: str) -> Chosen:
    """The samples of an index that a list names, in the index's order.

    An image is found by its key; without its ending; or below the folder that holds it, where the
    list's paths start inside of it (as those of OxfordPets, below ``images``).

    Args:
        index: of class folders or shards, with ``require="label"``.
        items: of a split.
        source: the split file, for messages.

    Raises:
        ValueError: none of the images is there, or a name fits several samples.
    """
    keys = index.keys()
    exact = _places(keys)
    inside = _places([key.partition("/")[2] or key for key in keys])
    found: dict[int, int] = {}
    lacking = []
    for image, label in items:
        stem = os.path.splitext(image)[0]
        hits = exact.get(image) or exact.get(stem) or inside.get(image) or []
        if len(hits) > 1:
            raise ValueError(
                f"split {source}: {image!r} is the key of {len(hits)} samples of the data; keys of "
                "a split file must tell samples apart"
            )
        if hits:
            found[hits[0]] = label
        else:
            lacking.append(image)
    if not found:
        first = f", the first is {items[0].image!r}" if items else ""
        raise ValueError(
            f"split {source}: none of its {len(items)} images is among the {len(keys)} of the "
            f"data{first}, and the first of the data is {keys[0]!r}; do they belong together?"
        )
    numbers = np.array(sorted(found), np.int64)
    labels = np.array([found[number] for number in numbers.tolist()], np.int64)
    return Chosen(numbers, labels, lacking)


def write_split(
    path: str | Path,
    index: DatasetIndex,
    names: Sequence[str],
    labels: np.ndarray,
    *,
    seed: int = 0,
    train: float = 0.5,
    val: float = 0.2,
) -> None:
    """Write a split of all samples of an index: shares of each class, CoOp's by default.

    Args:
        path: of the file.
        index: of class folders or shards.
        names: of the classes.
        labels: number of each sample's class.
        seed: of the draw.
        train: share of each class to train on.
        val: share to validate on; the rest tests.
    """
    rows: dict[str, list[tuple[str, int, str]]] = {part: [] for part in PARTS}
    keys = index.keys()
    for label, name in enumerate(names):
        own = [keys[number] for number in np.flatnonzero(labels == label)]
        own.sort(key=lambda key: _noise(seed, key))
        ends = [round(train * len(own)), round((train + val) * len(own)), len(own)]
        for part, start, end in zip(PARTS, [0, *ends], ends, strict=False):
            rows[part] += [(key, label, name) for key in sorted(own[start:end])]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    image, label, name = row
    number = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return number and all(isinstance(text, str) and text for text in (image, name))


def _places(keys: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).append(number)
    return found


def _noise(seed: int, image: str) -> bytes:
    return hashlib.sha256(f"{seed} ".encode() + os.fsencode(image)).digest()
