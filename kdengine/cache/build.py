# SPDX-License-Identifier: Apache-2.0
"""Fill a cache: every teacher once over k crops of each image, and over every caption.

The work is cut into units, a view or the captions of one shard. Ranks take units from a common
counter, so that all end at about the same time; a unit that is complete on disk is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from kdengine.cache import store
from kdengine.cache.builder import Builder
from kdengine.cache.manifest import MANIFEST, Manifest, TeacherEntry
from kdengine.data import DatasetIndex
from kdengine.durable import LOCK, hold
from kdengine.models import Teacher
from kdengine.ranks import Ranks


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
) -> Summary | None:
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

    Work: every shard is read and decoded once a view, which is little beside the teachers.
    Memory: one unit, i.e. the embeddings of a view of one shard.
    Communication: counters in the common store.

    Returns: what the cache holds, on rank 0; None on the others.

    Raises:
        ValueError: the folder holds a cache of other teachers, crops or storage.
        RuntimeError: another command fills it, an embedding is not finite, or nothing was done for
            ``builder.STALL_SECONDS``.
    """
    from kdengine.data.windows import CROP_AREA, CROP_ASPECT

    out = Path(out)
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
    lock = ranks.first_only(lambda: _begin(out, manifest), "cache")
    builder = Builder(
        index,
        teachers,
        out,
        manifest,
        ranks=ranks,
        batch_size=batch_size,
        num_threads=num_threads,
    )
    units = builder.units()
    num_made = builder.run(units, progress)
    if lock is None:
        return None
    facts = [store.read_facts(builder.folder(unit), unit.name) for unit in units]
    lock.close()
    num_rows = sum(fact["rows"] for fact in facts) * len(entries)
    return Summary(
        num_samples=sum(unit.num_rows for unit in units if unit.view == 0),
        num_captions=sum(unit.num_rows for unit in units if unit.view is None),
        num_bytes=sum(fact["bytes"] for fact in facts),
        num_made=num_made,
        mean_error=sum(fact["error_sum"] for fact in facts) / num_rows,
        max_error=max(fact["error_max"] for fact in facts),
    )


def _begin(out: Path, manifest: Manifest) -> IO[str]:
    """Make the folder, or see that what it holds is of the same kind; returns its lock, held."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cache: expected a folder that can be made, got {out} ({error.strerror}); name another"
        ) from None
    known = {MANIFEST, f"{MANIFEST}.partial", LOCK}
    if not (out / MANIFEST).exists() and any(path.name not in known for path in out.iterdir()):
        raise ValueError(
            f"cache: {out} is not empty and not a cache; name a new folder, or that of a cache"
        )
    lock = hold("cache", out)
    if (out / MANIFEST).exists():
        found = Manifest.read(out).differences(manifest)
        if found:
            raise ValueError(
                f"cache: {out} holds another cache: {'; '.join(found)}; give the options it was "
                "made with, or another folder"
            )
    else:
        manifest.write(out)
    return lock
