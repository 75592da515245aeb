# SPDX-License-Identifier: Apache-2.0
"""Evaluate a two-tower model on named data sets, on all ranks, as often as wanted."""

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from kdengine import distributed
from kdengine.data import Loader
from kdengine.data.index import MAX_PIXELS, DatasetIndex, ensure_index
from kdengine.data.progress import Progress
from kdengine.data.split import choose
from kdengine.data.subset import subset
from kdengine.data.summary import refuse_empty
from kdengine.data.tokenize import load_tokenizer
from kdengine.evaluate.classes import Contest, contest
from kdengine.evaluate.embed import Abandoned, ShouldStop, embed_images, image_loader
from kdengine.evaluate.probe import NUM_FITS, linear_probe, probe_labels
from kdengine.evaluate.retrieval import evaluate_retrieval
from kdengine.evaluate.sets import EvalSet
from kdengine.evaluate.zeroshot import check_labels, evaluate_zeroshot
from kdengine.models import TowerSpec, TwoTower
from kdengine.ranks import first_then_all

logger = logging.getLogger(__name__)


class Evaluator:
    """Opens the data sets once; then ``run`` evaluates a model on them, as often as wanted.

    Every rank of ``group`` makes one and calls ``run`` together with the others.

    Args:
        spec: what the model eats.
        sets: the data sets.
        batch_size: images in a forward pass of a rank; also captions and prompts.
        index_dir: folder of the indexes, where the shards' own cannot be written.
        max_pixels: see ``ensure_index``.
        num_threads: decoding threads of a rank.
        group: the ranks that share the work; None for one process.
        device: where the model will be.
        progress: show a bar for each set, on rank 0 and only where stderr is a terminal.

    Raises:
        ValueError: labels or class folders and class names do not fit, or a set has no good sample.
        RuntimeError: a data set could not be opened; on every rank alike.
    """

    def __init__(
        self,
        spec: TowerSpec,
        sets: Sequence[EvalSet],
        *,
        batch_size: int = 128,
        index_dir: str | None = None,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = 2,
        group: ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> None:
        self.spec, self.sets = spec, list(sets)
        self.batch_size, self.num_threads = batch_size, num_threads
        self.group, self.device = group, torch.device(device)
        self.progress = progress and distributed.rank(group) == 0 and sys.stderr.isatty()
        seen = spec.preprocess
        if (seen.interpolation, seen.resize_mode) != ("bicubic", "shortest"):
            logger.warning(
                "%s was trained with images resized by %s, %s; it is evaluated with bicubic, "
                "shortest, which may cost it some accuracy",
                spec.name,
                seen.interpolation,
                seen.resize_mode,
            )
        self.tokenizer = load_tokenizer(spec.tokenizer)
        self.indexes = [
            first_then_all(
                partial(_open, one, index_dir, max_pixels, self.progress),
                f"evaluation set {one.name}",
                group,
            )
            for one in self.sets
        ]
        if distributed.rank(group) == 0:
            for one, (index, *_) in zip(self.sets, self.indexes, strict=True):
                if one.kind == "zeroshot" and not one.has_split:
                    _warn_of_unused_names(one, index)

    def run(
        self, model: TwoTower, *, should_stop: ShouldStop | None = None
    ) -> dict[str, float] | None:
        """Evaluate; the model's training flag is restored afterwards.

        Batch-norm statistics differ between ranks; those of rank 0 count, and are written to the
        others.

        Args:
            model: on ``device``, with its whole weights.
            should_stop: asked after every batch on every rank; true on all ranks together gives up.

        Returns:
            ``{"<set>/<metric>": value}``, the same on every rank; None when given up.

        Raises:
            RuntimeError: an embedding is not finite; on every rank alike.
        """
        training = model.training
        model.eval()
        try:
            _share_buffers(model, self.group)
            metrics: dict[str, float] = {}
            for one, indexes in zip(self.sets, self.indexes, strict=True):
                with one.named_in_errors():
                    found = self._run_one(model, one, indexes, should_stop)
                metrics |= {f"{one.name}/{name}": value for name, value in found.items()}
            return metrics
        except Abandoned:
            return None
        finally:
            model.train(training)

    def _run_one(
        self,
        model: TwoTower,
        one: EvalSet,
        indexes: tuple[DatasetIndex, ...],
        should_stop: ShouldStop | None,
    ) -> dict[str, float]:
        index, world = indexes[0], distributed.world_size(self.group)
        contestants, templates = Contest([], np.empty(0, np.int64)), one.read_templates()
        texts: list[list[str]] = []
        if one.kind == "zeroshot":
            contestants = _contest(one, index)
        if one.kind == "retrieval":
            texts = index.texts(np.arange(index.num_samples))
        num_texts = len(contestants.names) * len(templates) + sum(map(len, texts))
        counts = [*(part.num_samples for part in indexes), num_texts]
        with contextlib.ExitStack() as stack:
            bars = stack.enter_context(Progress(self.progress))
            loaders = [self._loader(part) for part in indexes]
            for loader in loaders:
                stack.callback(loader.close)
            # every rank makes as many batches as the fullest
            num_batches = sum(-(-count // (self.batch_size * world)) for count in counts)
            advance = bars.begin(f"evaluate {one.name}", "batches", num_batches)
            shared: dict[str, Any] = {
                "group": self.group,
                "device": self.device,
                "should_stop": _after_batch(advance, should_stop),
            }
            if one.kind == "probe":
                train_label, test_label = probe_labels(*indexes)
                train, test = (
                    embed_images(model, loader, part.num_samples, **shared)
                    for loader, part in zip(loaders, indexes, strict=True)
                )
                advance = bars.begin(f"fit {one.name}", "fits", NUM_FITS)
                return linear_probe(train, train_label, test, test_label, advance=advance)
            shared["batch_size"] = self.batch_size
            if one.kind == "retrieval":
                return evaluate_retrieval(model, loaders[0], texts, self.tokenizer, **shared)
            names, labels = contestants
            shared["halves"] = one.has_split
            return evaluate_zeroshot(
                model, loaders[0], labels, names, templates, self.tokenizer, **shared
            )

    def _loader(self, index: DatasetIndex) -> Loader:
        return image_loader(
            self.spec, index, self.batch_size, self.num_threads, self.device, self.group
        )


def run_evaluation(
    model: TwoTower,
    spec: TowerSpec,
    sets: Sequence[EvalSet],
    *,
    should_stop: ShouldStop | None = None,
    **options: Any,
) -> dict[str, float] | None:
    """Open the data sets, evaluate once: ``Evaluator(spec, sets, **options).run(model)``.

    Returns:
        ``{"<set>/<metric>": value}``, the same on every rank; None when ``should_stop`` gave up.

    Raises:
        ValueError, RuntimeError: see ``Evaluator``.
    """
    return Evaluator(spec, sets, **options).run(model, should_stop=should_stop)


def _after_batch(advance: Callable[[int, int], None], should_stop: ShouldStop | None) -> ShouldStop:
    """What to ask after every batch, which is also when the bar moves on."""

    def ask() -> bool:
        advance(1, 1)
        return should_stop is not None and should_stop()

    return ask


def _open(
    one: EvalSet, index_dir: str | None, max_pixels: int, progress: bool
) -> tuple[DatasetIndex, ...]:
    """The index of the set, of a probe those of both parts."""
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
            names, labels = _contest(one, indexes[0])
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


def _contest(one: EvalSet, index: DatasetIndex) -> Contest:
    if one.has_split:
        return Contest(one.read_classnames(), index.labels())
    return contest(index, one.read_classnames(), str(one.classnames))


def _warn_of_unused_names(one: EvalSet, index: DatasetIndex) -> None:
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


def _share_buffers(model: nn.Module, group: ProcessGroup | None) -> None:
    if group is None:
        return
    source = dist.get_global_rank(group, 0)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=source, group=group)
