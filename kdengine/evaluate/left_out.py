# SPDX-License-Identifier: Apache-2.0
"""What of the sets was not evaluated, in words for people: a score is of the good images only."""

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from kdengine.data.index import DatasetIndex
from kdengine.data.progress import counted
from kdengine.data.shards import folders_told
from kdengine.evaluate.evaluator import Evaluator

# names of class folders in a line
MAX_NAMES = 10


def add_rows(table: Table, evaluator: Evaluator) -> None:
    """A row for each part of a set: how many of its images were quarantined."""
    table.add_section()
    for name, part, _, index in _parts(evaluator):
        bad, good = index.num_quarantined, index.num_samples
        table.add_row(name, f"quarantined{part}", f"{bad:,} of {bad + good:,}")


def remarks(evaluator: Evaluator) -> list[str]:
    """What was taken of folders, what could not be read, and which classes have no image."""
    lines = []
    for name, part, spec, index in _parts(evaluator):
        who = name + part
        lines += [f"{who}: {told}" for told in folders_told(spec)]
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


def _parts(evaluator: Evaluator) -> Iterator[tuple[str, str, str, DatasetIndex]]:
    """Name of the set, of its part if it has several, specification of the shards, and index."""
    for one, indexes in zip(evaluator.sets, evaluator.indexes, strict=True):
        parts = (", TRAIN", ", TEST") if len(indexes) > 1 else ("",)
        for part, spec, index in zip(parts, one.parts(), indexes, strict=True):
            yield one.name, part, spec, index


def _without_image(index: DatasetIndex) -> list[str]:
    """Class folders without a good image."""
    if index.classes is None:
        return []
    count = np.bincount(index.labels(), minlength=len(index.classes))
    return [name for name, num in zip(index.classes, count, strict=True) if not num]
