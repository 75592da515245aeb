# SPDX-License-Identifier: Apache-2.0
"""Bring the index of a list of shards up to date: validate new shards, tokenise captions."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdengine.data import store
from kdengine.data.causes import Fault
from kdengine.data.decode import Check, DaliCheck
from kdengine.data.progress import Progress
from kdengine.data.tokenize import Tokenizer, load_tokenizer, parse_tokenizer_id, tokenizer_version
from kdengine.data.validate import Rules, ShardContents, merge, validate_shard
from kdengine.data.workers import Advance, WorkerDied, WorkerPool, num_cores

# captions a task; below four tasks the start of processes takes longer than the work
TOKENS_CHUNK = 8192
# a smaller part of a shard is not worth reading the headers of the whole shard for
MIN_PART_BYTES = 2**27


class Place(NamedTuple):
    """A shard and the folder of its index."""

    shard: str
    folder: Path


@dataclass
class BuildStats:
    """What bringing the index up to date took; all zero when it was."""

    num_shards: int = 0
    num_samples: int = 0
    num_captions: int = 0
    validate_time_s: float = 0.0
    tokenize_time_s: float = 0.0


class _ShardTask(NamedTuple):
    """A part of a shard; its number among all shards, to put the parts together."""

    place: Place
    rules: Rules
    shard: int
    part: int
    num_parts: int


class _TokenTask(NamedTuple):
    folder: Path
    file: Path
    tokenizer_id: str
    first: int
    last: int


def update(
    places: Sequence[Place],
    rules: Rules,
    tokenizers: Sequence[str],
    *,
    num_workers: int | None,
    progress: bool,
    rebuild: bool,
) -> BuildStats:
    """Write the index of every shard that has none or a stale one, and missing token ids.

    Holds the locks of the folders it writes to; whoever waits for one finds the work done.
    """
    for tokenizer_id in tokenizers:
        parse_tokenizer_id(tokenizer_id)
    num_workers = num_cores() if num_workers is None else num_workers
    stats = BuildStats()
    wanting = [place for place in places if rebuild or _wants(place, rules, tokenizers)]
    # the list of a root is removed first and written last: a missing one tells of an interruption
    lists = {place.folder.parent: place.folder.parent / store.QUARANTINE for place in places}
    unlisted = {root for root, file in lists.items() if not file.exists()}
    with ExitStack() as stack, Progress(progress) as bars:
        # always in the same order, or two processes could wait for each other
        roots = sorted(unlisted.union(place.folder.parent for place in wanting))
        for root in roots:
            stack.enter_context(store.locked(root, bars.say))
        stale = [place for place in wanting if rebuild or _wants(place, rules, ())]
        for root in {place.folder.parent for place in stale}:
            lists[root].unlink(missing_ok=True)
        _validate(stale, rules, num_workers, bars, stats)
        for root in roots:
            if not lists[root].exists():
                store.write_root_quarantine(root)
        for tokenizer_id in tokenizers:
            _tokenize(wanting, tokenizer_id, num_workers, bars, stats)
    return stats


def _wants(place: Place, rules: Rules, tokenizers: Iterable[str]) -> bool:
    meta = store.load_meta(place.folder)
    if meta is None or meta["stamp"] != store.make_stamp(place.shard, rules):
        return True
    return not all(_has_tokens(meta, tokenizer_id) for tokenizer_id in tokenizers)


def _has_tokens(meta: dict[str, Any], tokenizer_id: str) -> bool:
    entry = meta["tokens"].get(tokenizer_id, {})
    return meta["num_captions"] == 0 or entry.get("version") == tokenizer_version()


def _validate(
    places: Sequence[Place], rules: Rules, num_workers: int, bars: Progress, stats: BuildStats
) -> None:
    """Index the shards; a part whose worker died is done again with the decoder kept apart."""
    if not places:
        return
    begin = time.perf_counter()
    stamps = [store.make_stamp(place.shard, rules) for place in places]
    tasks = _split(places, rules, [max(0, stamp["size"]) for stamp in stamps], num_workers)
    parts: dict[int, dict[int, ShardContents]] = {}
    advance = bars.begin("validate", "samples", sum(max(0, stamp["size"]) for stamp in stamps))
    with WorkerPool(min(num_workers, len(tasks))) as pool:
        for number, result in pool.run(validate_part, tasks, advance):
            task = tasks[number]
            if isinstance(result, WorkerDied):
                bars.say(f"{task.place.shard}: a worker died; looking for the image that did it")
                with IsolatedCheck() as check:
                    result = _validate_part(task, check, lambda *_: None)
            done = parts.setdefault(task.shard, {})
            done[task.part] = result
            if len(done) == task.num_parts:
                contents = merge([done[part] for part in sorted(parts.pop(task.shard))])
                store.write_shard(*task.place, contents, stamps[task.shard])
                stats.num_shards += 1
                stats.num_samples += len(contents.good) + len(contents.bad)
    stats.validate_time_s = time.perf_counter() - begin


def _split(
    places: Sequence[Place], rules: Rules, sizes: list[int], num_workers: int
) -> list[_ShardTask]:
    """Parts small enough that no worker is left alone at the end, the biggest shards first."""
    part_bytes = max(MIN_PART_BYTES, sum(sizes) // (4 * max(1, num_workers)))
    tasks = []
    for shard in sorted(range(len(places)), key=lambda number: -sizes[number]):
        num_parts = -(-sizes[shard] // part_bytes) if num_workers > 1 else 1
        for part in range(max(1, num_parts)):
            tasks.append(_ShardTask(places[shard], rules, shard, part, max(1, num_parts)))
    return tasks


def validate_part(task: _ShardTask, advance: Advance) -> ShardContents:
    """Worker's part: validate a part of a shard."""
    return _validate_part(task, _dali_check(), advance)


def _validate_part(task: _ShardTask, check: Check, advance: Advance) -> ShardContents:
    part = (task.part, task.num_parts)
    return validate_shard(task.place.shard, task.rules, check, advance, part)


@functools.cache
def _dali_check() -> DaliCheck:
    return DaliCheck()


def _decode(images: Sequence[bytes], advance: Advance) -> Fault | None:
    return _dali_check()(images)


class IsolatedCheck:
    """A `Check` that decodes in a process of its own, which an image may kill."""

    def __init__(self, function: Any = _decode) -> None:
        self._function = function
        self._pool = WorkerPool(1)

    def __enter__(self) -> IsolatedCheck:
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.__exit__(*details)

    def __call__(self, images: Sequence[bytes]) -> Fault | None:
        """None if every image decodes; `image-crash` if the process died."""
        [(_, result)] = self._pool.run(self._function, [images])
        if isinstance(result, WorkerDied):
            return Fault("image-crash", f"the decoder's process ended with {result.returncode}")
        return result


def _tokenize(
    places: Sequence[Place],
    tokenizer_id: str,
    num_workers: int,
    bars: Progress,
    stats: BuildStats,
) -> None:
    """Write the token ids of every caption of those shards that lack them."""
    lacking: list[tuple[Place, dict[str, Any], Path]] = []
    tasks: list[_TokenTask] = []
    for place in places:
        meta = store.load_meta(place.folder)
        if meta is None:
            raise RuntimeError(f"index: {place.folder} vanished while it was written; start again")
        if _has_tokens(meta, tokenizer_id):
            continue
        scratch = _token_file(place.folder, tokenizer_id).with_suffix(".tmp")
        _allocate(scratch, tokenizer_id, meta["num_captions"])
        lacking.append((place, meta, scratch))
        for first in range(0, meta["num_captions"], TOKENS_CHUNK):
            last = min(first + TOKENS_CHUNK, meta["num_captions"])
            tasks.append(_TokenTask(place.folder, scratch, tokenizer_id, first, last))
    if not tasks:
        return
    total = sum(task.last - task.first for task in tasks)
    num_processes = 0 if total < 4 * TOKENS_CHUNK else min(num_workers, len(tasks))
    if num_processes == 0:
        # the import of open_clip takes seconds that would spoil the speed
        _tokenizer(tokenizer_id)
    begin = time.perf_counter()
    advance = bars.begin(f"tokenise {tokenizer_id}", "captions", total)
    with WorkerPool(num_processes) as pool:
        for number, result in pool.run(write_tokens, tasks, advance):
            if isinstance(result, WorkerDied):
                raise RuntimeError(
                    f"index: the worker that tokenised {tasks[number].folder} with {tokenizer_id} "
                    f"died (exit code {result.returncode}); out of memory? Try fewer workers: "
                    "'kdengine index --workers N'"
                )
    for place, meta, scratch in lacking:
        file = scratch.rename(_token_file(place.folder, tokenizer_id))
        meta["tokens"][tokenizer_id] = {"file": file.name, "version": tokenizer_version()}
        meta["files"][file.name] = file.stat().st_size
        store.save_meta(place.folder, meta)
    stats.num_captions += total
    stats.tokenize_time_s += time.perf_counter() - begin


def _token_file(folder: Path, tokenizer_id: str) -> Path:
    return folder / f"tokens-{hashlib.sha256(tokenizer_id.encode()).hexdigest()[:12]}.npy"


def _allocate(file: Path, tokenizer_id: str, num_captions: int) -> None:
    kind, _, context_length, _ = parse_tokenizer_id(tokenizer_id)
    # the 49,408 ids of open_clip's own vocabulary fit into two bytes
    dtype = np.uint16 if kind == "simple" else np.int32
    np.lib.format.open_memmap(file, "w+", dtype, (num_captions, context_length)).flush()


def write_tokens(task: _TokenTask, advance: Advance) -> None:
    """Worker's part: token ids of some captions of one shard, into the shard's file."""
    starts = np.load(task.folder / "captions.npy", mmap_mode="r")
    text = np.memmap(task.folder / "captions.bin", np.uint8, "r")
    captions = [
        bytes(text[starts[number] : starts[number + 1]]).decode()
        for number in range(task.first, task.last)
    ]
    tokenizer = _tokenizer(task.tokenizer_id)
    target = np.lib.format.open_memmap(task.file, "r+")
    for first in range(0, len(captions), 512):
        part = captions[first : first + 512]
        ids = tokenizer(part).numpy()
        if ids.min() < 0 or ids.max() > np.iinfo(target.dtype).max:
            raise RuntimeError(
                f"index: {task.tokenizer_id} gave ids from {ids.min()} to {ids.max()}, which do "
                f"not fit into {target.dtype}"
            )
        target[task.first + first : task.first + first + len(part)] = ids
        advance(len(part), len(part))
    target.flush()


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer_id: str) -> Tokenizer:
    return load_tokenizer(tokenizer_id)
