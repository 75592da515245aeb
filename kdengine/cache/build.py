# SPDX-License-Identifier: Apache-2.0
"""Fill a cache: every teacher once over k crops of each image, and over every caption.

The work is cut into units, a view or the captions of one shard. Ranks take units from a common
counter, so that all end at about the same time; a unit that is complete on disk is left out.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.cache import codec, store
from kdengine.cache.manifest import MANIFEST, Manifest, TeacherEntry
from kdengine.data import DatasetIndex, ShardIndex, ViewSpec, build_loader
from kdengine.data.progress import Progress
from kdengine.models import Teacher
from kdengine.ranks import Ranks


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


@dataclass(frozen=True)
class Summary:
    """What a cache holds for an index.

    Attributes:
        num_samples: samples, those of a shard listed twice once.
        num_captions: their captions.
        num_bytes: of the embeddings and crops.
        num_made: rows (views and captions) that were embedded this time.
        mean_error: mean length of what storing changed, of unit vectors.
        max_error: the largest.
    """

    num_samples: int
    num_captions: int
    num_bytes: int
    num_made: int
    mean_error: float
    max_error: float


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
        wanted = [ViewSpec(size=x.size, mean=x.mean, std=x.std) for x in specs]
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

    def run(self, pending: Sequence[Unit], progress: bool) -> None:
        """Make the pending units, in turn with the other ranks."""
        call = self._ranks.broadcast(uuid.uuid4().hex)
        total = sum(unit.num_rows for unit in pending)
        with Progress(progress and self._ranks.first and total > 0) as bars:
            advance = bars.begin("embedding", "views and captions", total)
            shown = 0
            while (ticket := self._ranks.count(f"cache/{call}/next", 1) - 1) < len(pending):
                for more in self._make(pending[ticket]):
                    done = self._ranks.count(f"cache/{call}/done", more)
                    advance(done - shown, done - shown)
                    shown = done
        self._ranks.barrier()

    def _make(self, unit: Unit) -> Iterator[int]:
        """Embed and write a unit; yields rows done since."""
        arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        errors = []
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
            yield len(embeddings[0])
        lost = torch.cat(errors)
        store.write_unit(
            self.folder(unit),
            unit.name,
            {name: np.concatenate(parts) for name, parts in arrays.items()},
            {"rows": unit.num_rows, "error_sum": float(lost.sum()), "error_max": float(lost.max())},
        )

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


def build_cache(
    index: DatasetIndex,
    teachers: Sequence[Teacher],
    weights: Sequence[str],
    out: str | Path,
    *,
    views: int,
    storage: str,
    seed: int,
    ranks: Ranks,
    batch_size: int = 256,
    num_threads: int = 4,
    progress: bool = False,
) -> Summary:
    """Embed ``views`` crops of every image and every caption of an index by each teacher.

    Rows are L2-normalised before they are stored. A cache that is there is gone on with: what is
    complete stays, shards that it lacks are added.

    Args:
        index: the samples; it holds the token ids of every teacher's tokenizer.
        teachers: on this rank's device.
        weights: sha256 of the file of each teacher's weights.
        out: folder of the cache.
        views: crops of each image, at least 1, drawn as in training.
        storage: fp32, bf16 or int8; see ``codec``.
        seed: of the crops.
        ranks: who shares the work; each calls this.
        batch_size: images or captions in a forward pass.
        num_threads: decoding threads of a rank.
        progress: show a bar, on rank 0.

    Memory: one unit, i.e. the embeddings of a view of one shard.
    Communication: a counter in the common store; one barrier.

    Raises:
        ValueError: the folder holds a cache of other teachers, crops or storage.
        RuntimeError: an embedding is not finite.
    """
    out = Path(out)
    from kdengine.data.dali import CROP_AREA, CROP_ASPECT

    entries = [
        TeacherEntry(
            spec=teacher.spec,
            weights=digest,
            scale=teacher.scale(),
            precision="bf16" if teacher.dtype == torch.bfloat16 else "fp32",
        )
        for teacher, digest in zip(teachers, weights, strict=True)
    ]
    manifest = Manifest(tuple(entries), views, storage, seed, CROP_AREA, CROP_ASPECT)
    ranks.first_then_all(lambda: _begin(out, manifest), "cache")
    options: dict[str, Any] = {"batch_size": batch_size, "num_threads": num_threads}
    builder = Builder(index, teachers, out, manifest, ranks=ranks, **options)
    units = builder.units()
    pending = [unit for unit in units if not store.is_complete(builder.folder(unit), unit.name)]
    # every rank has looked before the first one writes
    ranks.barrier()
    builder.run(pending, progress)
    facts = [store.read_facts(builder.folder(unit), unit.name) for unit in units]
    num_rows = sum(fact["rows"] for fact in facts) * len(entries)
    return Summary(
        num_samples=sum(unit.num_rows for unit in units if unit.view == 0),
        num_captions=sum(unit.num_rows for unit in units if unit.view is None),
        num_bytes=sum(fact["bytes"] for fact in facts),
        num_made=sum(unit.num_rows for unit in pending),
        mean_error=sum(fact["error_sum"] for fact in facts) / num_rows,
        max_error=max(fact["error_max"] for fact in facts),
    )


def _begin(out: Path, manifest: Manifest) -> None:
    """Make the folder, or see that what it holds is of the same kind."""
    out.mkdir(parents=True, exist_ok=True)
    store.clear_partial(out)
    if (out / MANIFEST).exists():
        there = Manifest.read(out)
        found = there.differences(manifest)
        if found:
            raise ValueError(
                f"cache: {out} holds another cache: {'; '.join(found)}; give the options it was "
                "made with, or another folder"
            )
    elif any(out.iterdir()):
        raise ValueError(
            f"cache: {out} is not empty and not a cache; name a new folder, or that of a cache"
        )
    else:
        manifest.write(out)
