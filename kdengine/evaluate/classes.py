# SPDX-License-Identifier: Apache-2.0
"""Which class a folder of images stands for: told by its name, never by its place in an order.

ImageNet-V2's public archive has folders `0` to `999`, which sort as text into 0, 1, 10, 100, 101:
who takes the position for the class gets almost every label wrong. Folders named by WordNet ids
sort into the order of ILSVRC only where all 1000 are there; ImageNet-R and -A have 200.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdengine.data.index import DatasetIndex

NUM_IMAGENET = 1000


class Contest(NamedTuple):
    """The classes that compete, and the place among them of each sample's own, int64 [n]."""

    names: list[str]
    labels: np.ndarray


def contest(index: DatasetIndex, names: Sequence[str], source: str) -> Contest:
    """The classes a zero-shot set is about: of shards all, of class folders those with a folder.

    So ImageNet-R and -A, 200 folders of 1000 classes, are scored by their protocol: over the
    columns of these 200 in the logits of the 1000.

    Args:
        index: of shards with `.cls` members (numbers of class names), or of class folders.
        names: all class names, in the order of the class numbers.
        source: where the names come from: a file, or the word ``imagenet``.

    Raises:
        ValueError: see ``class_numbers``.
    """
    labels = index.labels()
    if index.classes is None:
        return Contest(list(names), labels)
    number = np.array(class_numbers(index.classes, names, source), np.int64)
    order = np.argsort(number)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Contest([names[n] for n in number[order]], place[labels])


def class_numbers(folders: Sequence[str], names: Sequence[str], source: str) -> list[int]:
    """The class number of each class folder.

    All folders are named in one of three ways, looked for in this order: as their classes
    (``great white shark``; case does not matter, ``_`` and ``-`` are blanks); by WordNet ids, where
    the classes are ImageNet's 1000 in the order of ILSVRC (the word ``imagenet``, or a file of 1000
    names, which is taken to be in that order); by class numbers (``7`` or ``007`` is the name on
    line 7, counted from 0).

    Args:
        folders: names of the class folders.
        names: all class names, in the order of the class numbers.
        source: where the names come from, for messages; ``imagenet`` is a word.

    Raises:
        ValueError: a folder fits no class, fits two, or two folders fit one.
    """
    ways = {"a class name": _by_name(folders, names)}
    if len(names) == NUM_IMAGENET:
        ways["a WordNet id of ILSVRC-2012 (as n01440764)"] = _by_wordnet_id(folders)
    ways[f"a class number from 0 to {len(names) - 1}"] = {
        folder: [int(folder)]
        for folder in folders
        if _is_number(folder) and int(folder) < len(names)
    }
    # the way that fits the most folders is the one that was meant
    fitting = max(ways.values(), key=len)
    told = f"class folders, with {len(names)} classes of {source}"
    owner: dict[int, str] = {}
    for folder in folders:
        numbers = fitting.get(folder, [])
        if not numbers:
            raise ValueError(
                f"{told}: the folder {folder!r} is no class ({len(folders) - len(fitting)} of "
                f"{len(folders)} are not); expected each folder to be named by "
                f"{', or each by '.join(ways)}. The order of the folders is never taken for that "
                "of the classes: rename the folder, take it away, or give the names that belong to "
                "these folders"
            )
        if len(numbers) > 1:
            raise ValueError(
                f"{told}: the folder {folder!r} has the name of the classes {numbers}, which are "
                "called alike; name the folders by class numbers"
            )
        if numbers[0] in owner:
            raise ValueError(
                f"{told}: the folders {owner[numbers[0]]!r} and {folder!r} both stand for class "
                f"{numbers[0]} ({names[numbers[0]]!r}); put their images into one"
            )
        owner[numbers[0]] = folder
    return [fitting[folder][0] for folder in folders]


def _by_name(folders: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(_plain(name), []).append(number)
    return {folder: found[_plain(folder)] for folder in folders if _plain(folder) in found}


def _by_wordnet_id(folders: Sequence[str]) -> dict[str, list[int]]:
    from kdengine.models.prompts import imagenet_wordnet_ids

    number = {wordnet_id: number for number, wordnet_id in enumerate(imagenet_wordnet_ids())}
    return {folder: [number[folder]] for folder in folders if folder in number}


def _plain(name: str) -> str:
    return " ".join(re.sub("[_-]", " ", name).casefold().split())


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", name) is not None
