# SPDX-License-Identifier: Apache-2.0
"""What of the sets was not evaluated, in words for people: a score is of the good images only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from kdengine.data.index import DatasetIndex
from kdengine.data.progress import counted
from kdengine.data.shards import folders_told
from kdengine.evaluate.sets import EvalSet

# names of class folders in a line
MAX_NAMES = 10


@dataclass(frozen=True)
class Part:
    """What of a data set is one list of shards."""

    name: str
    suffix: str
    shards: str
    index: DatasetIndex


def parts_of(
    sets: Sequence[EvalSet], indexes: Sequence[tuple[DatasetIndex, ...]]
) -> Iterator[Part]:
    """The parts of sets; of a probe they are named ``, TRAIN`` and ``, TEST``."""
    for one, own in zip(sets, indexes, strict=True):
        suffixes = (", TRAIN", ", TEST") if len(own) > 1 else ("",)
        for suffix, shards, index in zip(suffixes, one.parts(), own, strict=True):
            yield Part(one.name, suffix, shards, index)


def add_rows(table: Table, parts: Iterable[Part]) -> None:
    """A row for each part: how many of its images were quarantined."""
    table.add_section()
    for part in parts:
        bad, good = part.index.num_quarantined, part.index.num_samples
        table.add_row(part.name, f"quarantined{part.suffix}", f"{bad:,} of {bad + good:,}")


def remarks(parts: Iterable[Part]) -> list[str]:
    """What was taken of folders, what could not be read, and which classes have no image."""
    lines = []
    for part in parts:
        who, index = part.name + part.suffix, part.index
        lines += [f"{who}: {told}" for told in folders_told(part.shards)]
        archives = index.summary()["archives"]
        # the samples of such a shard are counted one by one
        archives.pop("archive-no-good-sample", None)
        if archives:
            told = ", ".join(f"{cause} {count:,}" for cause, count in archives.items())
            whole = f"not all of {counted(index.num_listed, 'shard')} could be read whole"
            lines.append(f"{who}: {whole}: {told}")
        if index.num_quarantined or archives:
            lines.append(f"{who}: causes are listed in {index.quarantine_paths[0]}")
        if empty := _without_image(index):
            listed = ", ".join(empty[:MAX_NAMES]) + (", ..." if len(empty) > MAX_NAMES else "")
            told = f"{len(empty):,} of {len(index.classes or ()):,} class folders"
            lines.append(f"{who}: no good image in {told}: {listed}")
    return lines


def _without_image(index: DatasetIndex) -> list[str]:
    """Class folders without a good image."""
    if index.classes is None:
        return []
    count = np.bincount(index.labels(), minlength=len(index.classes))
    return [name for name, num in zip(index.classes, count, strict=True) if not num]
