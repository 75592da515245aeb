# SPDX-License-Identifier: Apache-2.0
"""The work of filling a cache: its units, dealt out to the ranks, from images to stored rows."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.cache import codec, store
from kdengine.cache.manifest import Manifest
from kdengine.data import DatasetIndex, ShardIndex, ViewSpec, build_loader
from kdengine.data.progress import Progress
from kdengine.models import Teacher
from kdengine.ranks import POLL_SECONDS, Ranks

# a rank that is alone with the last unit may work on it for so long between two batches
STALL_SECONDS = 3600


@dataclass(frozen=True)
class Unit:
    """A view of one shard, or with ``view`` None its captions."""

    shard: ShardIndex
    view: int | None
    num_rows: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return store.TEXT if self.view is None else store.view_name(self.view)


class Builder:
    """Fills a cache for an index on all ranks; see ``build_cache``."""

    def __init__(
        self,
        index: DatasetIndex,
        teachers: Sequence[Teacher],
        out: Path,
        manifest: Manifest,
        *,
        ranks: Ranks,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self._index, self._teachers, self._out = index, list(teachers), out
        self._manifest, self._ranks = manifest, ranks
        self._batch_size, self._num_threads = batch_size, num_threads
        # teachers that want the same image read it from one view
        specs = [teacher.spec.preprocess for teacher in teachers]
        wanted = [ViewSpec.like(x) for x in specs]
        names = {view: f"image_{i}" for i, view in enumerate(dict.fromkeys(wanted))}
        self._views = {name: view for view, name in names.items()}
        self._names = [names[view] for view in wanted]

    def units(self) -> list[Unit]:
        """All units of the index."""
        found = []
        for shard in store.unique_shards(self._index):
            num_captions = self._index.only(shard).summary()["captions"]
            found.append(Unit(shard, None, num_captions))
            found += [Unit(shard, v, shard.num_samples) for v in range(self._manifest.views)]
        return found

    def folder(self, unit: Unit) -> Path:
        """Where the units of its shard lie."""
        return store.shard_folder(self._out, unit.shard)

    def run(self, units: Sequence[Unit], progress: bool) -> int:
        """Make the units that are not there, in turn with the other ranks; returns their rows."""
        ranks = self._ranks
        # rank 0 has looked before any rank writes
        call, wanted = ranks.broadcast(
            (uuid.uuid4().hex, [i for i, unit in enumerate(units) if not self._is_there(unit)])
            if ranks.first
            else None
        )
        total = sum(units[i].num_rows for i in wanted)
        with Progress(progress and ranks.first and total > 0) as bars:
            advance = bars.begin("embedding", "views and captions", total)
            shown = 0

            def count(more: int) -> int:
                nonlocal shown
                done = ranks.count(f"cache/{call}/done", more)
                advance(done - shown, done - shown)
                shown = done
                return done

            while (ticket := ranks.count(f"cache/{call}/next", 1) - 1) < len(wanted):
                for more in self._make(units[wanted[ticket]]):
                    count(more)
            # the others wait as long as rank 0 does, and that is as long as there is progress
            ranks.first_only(lambda: await_total(count, total), "cache")
        return total

    def _is_there(self, unit: Unit) -> bool:
        return store.is_complete(self.folder(unit), unit.name)

    def _make(self, unit: Unit) -> Iterator[int]:
        """Embed and write a unit; yields rows done since."""
        arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        errors, num_rows = [], 0
        batches = self._texts(unit) if unit.view is None else self._images(unit)
        for window, embeddings in batches:
            if window is not None:
                arrays[store.WINDOWS].append(window)
            for number, rows in enumerate(embeddings):
                rows = self._unit_rows(rows, number, unit)
                stored = codec.encode(rows, self._manifest.storage)
                errors.append(codec.errors(rows, stored, self._manifest.storage))
                for part, values in stored.items():
                    arrays[store.array_name(number, part)].append(values)
            if num_rows:
                yield num_rows
            num_rows = len(embeddings[0])
        lost = torch.cat(errors)
        store.write_unit(
            self.folder(unit),
            unit.name,
            {name: np.concatenate(parts) for name, parts in arrays.items()},
            {"rows": unit.num_rows, "error_sum": float(lost.sum()), "error_max": float(lost.max())},
        )
        # the last rows count when the unit is on the disk
        yield num_rows

    def _unit_rows(self, rows: Tensor, number: int, unit: Unit) -> Tensor:
        found = F.normalize(rows.float(), dim=1).cpu()
        if not bool(torch.isfinite(found).all()):
            raise RuntimeError(
                f"cache: teacher {self._teachers[number].spec.name} gives embeddings of "
                f"{unit.shard.tar} that are not finite; look at its weights, or try "
                "--distill.distill-precision fp32"
            )
        return found

    def _images(self, unit: Unit) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        from kdengine.data.dali import derive_seed

        assert unit.view is not None
        ranks, seed = self._ranks, self._manifest.seed
        loader = build_loader(
            self._index.only(unit.shard),
            views=self._views,
            tokenizers={},
            batch_size=min(self._batch_size, unit.num_rows),
            num_threads=self._num_threads,
            train=False,
            device_id=ranks.local_rank if ranks.device.type == "cuda" else None,
            # other crops in every shard and view, whatever else is in the index
            crop_seed=derive_seed(seed, unit.view, int(unit.shard.content_digest()[:12], 16)),
        )
        try:
            for batch in loader:
                # padding is at the end of the last batch
                valid = int(batch["valid"].sum())
                embeddings = [
                    teacher.encode_image(batch[name])[:valid]
                    for teacher, name in zip(self._teachers, self._names, strict=True)
                ]
                yield batch["window"][:valid].cpu().numpy().astype(np.int32), embeddings
        finally:
            loader.close()

    def _texts(self, unit: Unit) -> Iterator[tuple[None, list[Tensor]]]:
        index = self._index.only(unit.shard)
        counts = index.num_captions(np.arange(unit.shard.num_samples))
        samples = np.repeat(np.arange(len(counts)), counts)
        captions = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
        tables = [index.captions(teacher.spec.tokenizer) for teacher in self._teachers]
        for first in range(0, len(samples), self._batch_size):
            part = slice(first, first + self._batch_size)
            embeddings = []
            for teacher, table in zip(self._teachers, tables, strict=True):
                tokens = torch.from_numpy(table.tokens(samples[part], captions[part]))
                embeddings.append(teacher.encode_text(tokens.long().to(self._ranks.device)))
            yield None, embeddings


def await_total(count: Callable[[int], int], total: int) -> None:
    """Wait until ``count(0)`` says ``total``.

    Raises:
        RuntimeError: it did not change for ``STALL_SECONDS``.
    """
    last, since = -1, time.monotonic()
    while (done := count(0)) < total:
        if done != last:
            last, since = done, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise RuntimeError(
                f"cache: {total - done} of {total} rows are missing and no rank has done any for "
                f"{STALL_SECONDS} s; see what the other ranks said last, and give the command again"
            )
        time.sleep(POLL_SECONDS)
