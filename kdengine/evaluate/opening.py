# SPDX-License-Identifier: Apache-2.0
"""Opening a data set: its index, and whether labels and class names fit each other."""

import logging

import numpy as np
import torch

from kdengine.data.index import DatasetIndex, ensure_index
from kdengine.data.split import choose
from kdengine.data.subset import subset
from kdengine.data.summary import refuse_empty
from kdengine.evaluate.classes import Contest, contest
from kdengine.evaluate.probe import probe_labels
from kdengine.evaluate.sets import EvalSet
from kdengine.evaluate.zeroshot import check_labels

logger = logging.getLogger(__name__)


def open_set(
    one: EvalSet, index_dir: str | None, max_pixels: int, progress: bool
) -> tuple[DatasetIndex, ...]:
    """The index of the set, of a probe those of both parts.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see ``ensure_index``; or there is no good
            sample, or labels or class folders and class names do not fit; all name the set.
    """
    with one.named_in_errors():
        indexes = tuple(
            ensure_index(
                part,
                index_dir=index_dir,
                max_pixels=max_pixels,
                require="caption" if one.kind == "retrieval" else "label",
                progress=progress,
            )
            for part in one.parts()
        )
        for index in indexes:
            refuse_empty(index, who="")
            tars = [shard.tar for shard in index.shards]
            if twice := {tar for tar in tars if tars.count(tar) > 1}:
                raise ValueError(f"every sample counts once; listed twice: {sorted(twice)}")
        if one.has_split:
            indexes = (_listed(one, indexes[0]),)
        if one.kind == "zeroshot":
            names, labels = contestants(one, indexes[0])
            check_labels(torch.as_tensor(labels), len(names))
        if one.kind == "probe":
            probe_labels(*indexes)
        return indexes


def _listed(one: EvalSet, index: DatasetIndex) -> DatasetIndex:
    """The samples of a list of the split file, with its classes."""
    split = one.read_split()
    chosen = choose(index, split.parts[one.part], str(one.classnames))
    if chosen.lacking:
        logger.warning(
            "evaluation set %s: %d listed images are not in the data, or quarantined; the first is "
            "%s",
            one.name,
            len(chosen.lacking),
            chosen.lacking[0],
        )
    return subset(index, chosen.numbers, chosen.labels, split.classes)


def contestants(one: EvalSet, index: DatasetIndex) -> Contest:
    """The classes of a zero-shot set that compete, and the labels of its samples among them."""
    if one.has_split:
        return Contest(one.read_classnames(), index.labels())
    return contest(index, one.read_classnames(), str(one.classnames))


def warn_of_unused_names(one: EvalSet, index: DatasetIndex) -> None:
    """A list of another data set's names is likely where most names have no image."""
    if index.classes is not None and not all(name.isdecimal() for name in index.classes):
        # names and WordNet ids fit their own list only
        return
    num_names, num_used = len(one.read_classnames()), len(np.unique(index.labels()))
    # few images cannot have many classes
    if 2 * num_used < min(num_names, index.num_samples):
        logger.warning(
            "evaluation set %s: its labels are only %d of %d class names; do the names belong to "
            "these images?",
            one.name,
            num_used,
            num_names,
        )
