# SPDX-License-Identifier: Apache-2.0
"""Evaluate a two-tower model on named data sets, on all ranks, as often as wanted."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kdengine import distributed
from kdengine.data import Loader
from kdengine.data.index import MAX_PIXELS, DatasetIndex
from kdengine.data.progress import Progress
from kdengine.data.tokenize import load_tokenizer
from kdengine.evaluate.embed import Abandoned, ShouldStop, embed_images, image_loader
from kdengine.evaluate.opening import contestants, open_set, warn_of_unused_names
from kdengine.evaluate.probe import NUM_FITS, linear_probe, probe_labels
from kdengine.evaluate.retrieval import evaluate_retrieval
from kdengine.evaluate.sets import EvalSet
from kdengine.evaluate.zeroshot import evaluate_zeroshot
from kdengine.models import TowerSpec, TwoTower
from kdengine.ranks import first_then_all

logger = logging.getLogger(__name__)

Kept = dict[tuple[str, ...], Tensor]
"""Image embeddings by a model, [n, D], by the shards they are of."""


class Evaluator:
    """Opens the data sets once; then ``run`` evaluates a model on them, as often as wanted.

    Where one bad set must not cost the others, ``open`` and ``run_set`` take them one by one. Every
    rank of ``group`` makes an evaluator and calls its methods together with the others.

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
        self.index_dir, self.max_pixels = index_dir, max_pixels
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
        self.indexes = [self.open(one) for one in self.sets]

    def open(self, one: EvalSet) -> tuple[DatasetIndex, ...]:
        """The index of a set, of a probe those of both parts.

        Raises:
            ValueError, RuntimeError: as the class.
        """
        work = partial(open_set, one, self.index_dir, self.max_pixels, self.progress)
        indexes = first_then_all(work, f"evaluation set {one.name}", self.group)
        if one.kind == "zeroshot" and not one.has_split and distributed.rank(self.group) == 0:
            warn_of_unused_names(one, indexes[0])
        return indexes

    def run(
        self, model: TwoTower, *, should_stop: ShouldStop | None = None
    ) -> dict[str, float] | None:
        """Evaluate on all sets, see ``evaluating``.

        Args:
            model: on ``device``, with its whole weights.
            should_stop: asked after every batch on every rank; true on all ranks together gives up.

        Returns:
            ``{"<set>/<metric>": value}``, the same on every rank; None when given up.

        Raises:
            RuntimeError: an embedding is not finite; on every rank alike.
        """
        metrics: dict[str, float] = {}
        try:
            with self.evaluating(model):
                for one, indexes in zip(self.sets, self.indexes, strict=True):
                    found = self.run_set(model, one, indexes, should_stop=should_stop)
                    metrics |= {f"{one.name}/{name}": value for name, value in found.items()}
        except Abandoned:
            return None
        return metrics

    @contextlib.contextmanager
    def evaluating(self, model: TwoTower) -> Iterator[None]:
        """Put a model into evaluation mode; its training flag is restored afterwards.

        Batch-norm statistics differ between ranks; those of rank 0 count, and are written to the
        others.
        """
        training = model.training
        model.eval()
        try:
            _share_buffers(model, self.group)
            yield
        finally:
            model.train(training)

    def run_set(
        self,
        model: TwoTower,
        one: EvalSet,
        indexes: tuple[DatasetIndex, ...],
        *,
        kept: Kept | None = None,
        should_stop: ShouldStop | None = None,
    ) -> dict[str, float]:
        """Evaluate on one set, inside ``evaluating``.

        Args:
            model: on ``device``, with its whole weights.
            one: the set.
            indexes: what ``open`` made of it.
            kept: embeddings by this model that another zero-shot or probe set has left here, so
                that images of both are embedded once; those of this one are added.
            should_stop: see ``run``.

        Returns:
            ``{metric: value}``, the same on every rank.

        Raises:
            ValueError, RuntimeError: see ``linear_probe`` and ``embed_images``; they name the set.
            Abandoned: see ``should_stop``.
        """
        # the good images of a retrieval set are others, a split file lists some of them
        if kept is None or one.kind == "retrieval" or one.has_split:
            kept = {}
        with one.named_in_errors(), Progress(self.progress) as bars:
            return self._run_set(model, one, indexes, kept, bars, should_stop)

    def _run_set(
        self,
        model: TwoTower,
        one: EvalSet,
        indexes: tuple[DatasetIndex, ...],
        kept: Kept,
        bars: Progress,
        should_stop: ShouldStop | None,
    ) -> dict[str, float]:
        index, world, templates = indexes[0], distributed.world_size(self.group), []
        texts: list[list[str]] = []
        names: list[str] = []
        if one.kind == "zeroshot":
            (names, labels), templates = contestants(one, index), one.read_templates()
        if one.kind == "retrieval":
            texts = index.texts(np.arange(index.num_samples))
        counts = [part.num_samples for part in indexes if _shards(part) not in kept]
        counts.append(len(names) * len(templates) + sum(map(len, texts)))
        # every rank makes as many batches as the fullest
        num_batches = sum(-(-count // (self.batch_size * world)) for count in counts)
        advance = bars.begin(f"evaluate {one.name}", "batches", num_batches)
        shared: dict[str, Any] = {
            "group": self.group,
            "device": self.device,
            "should_stop": _after_batch(advance, should_stop),
        }
        images = [self._embed(model, part, kept, **shared) for part in indexes]
        if one.kind == "probe":
            train_label, test_label = probe_labels(*indexes)
            advance = bars.begin(f"fit {one.name}", "fits", NUM_FITS)
            return linear_probe(images[0], train_label, images[1], test_label, advance=advance)
        shared |= {"batch_size": self.batch_size}
        if one.kind == "retrieval":
            return evaluate_retrieval(model, images[0], texts, self.tokenizer, **shared)
        return evaluate_zeroshot(
            model,
            images[0],
            labels,
            names,
            templates,
            self.tokenizer,
            halves=one.has_split,
            **shared,
        )

    def _embed(self, model: TwoTower, index: DatasetIndex, kept: Kept, **options: Any) -> Tensor:
        """The embeddings of the images of an index, kept or new."""
        shards = _shards(index)
        if shards not in kept:
            with contextlib.closing(self._loader(index)) as loader:
                kept[shards] = embed_images(model, loader, index.num_samples, **options)
        return kept[shards]

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


def _shards(index: DatasetIndex) -> tuple[str, ...]:
    return tuple(shard.tar for shard in index.shards)


def _share_buffers(model: nn.Module, group: ProcessGroup | None) -> None:
    if group is None:
        return
    source = dist.get_global_rank(group, 0)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=source, group=group)
