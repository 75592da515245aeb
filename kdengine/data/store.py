# SPDX-License-Identifier: Apache-2.0
"""The index on disk: one folder a shard, complete or absent, and the stamp that dates it.

    ROOT/quarantine.jsonl            every quarantined sample and archive below ROOT
    ROOT/SHARD.tar/meta.json         stamp, counts, names and sizes of the other files
    ROOT/SHARD.tar/images.idx        DALI's index of the good samples; not for a folder of images
    ROOT/SHARD.tar/samples.npy       int64 [n + 1, 3]: start of the key, first caption, label
    ROOT/SHARD.tar/keys.bin          the keys, UTF-8, one after the other
    ROOT/SHARD.tar/captions.{npy,bin}  int64 [c + 1] starts, and the captions, likewise
    ROOT/SHARD.tar/tokens-HASH.npy   ids of every caption for one tokenizer, [c, context]
    ROOT/SHARD.tar/quarantine.jsonl  the part of this shard

ROOT is `.kdengine/RULES` beside the shards, or a folder in the index folder that carries a hash
of the shards' own folder, so that equal file names from two folders do not meet. RULES is `caption`
or `label`, with `-maxPIXELS` where that is not the default: indexes by other rules lie side by
side, and who opens one leaves alone what another process reads.

A folder of class folders has an index like that of a shard, beside the folder: the keys are the
paths of the images below it, the labels the numbers of the class folders that meta.json lists.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kdengine import MAX_PIXELS
from kdengine.data.folder import fingerprint
from kdengine.data.validate import GoodSample, Rules, ShardContents

FORMAT = 1
QUARANTINE = "quarantine.jsonl"
KEY_START, CAPTION_FIRST, LABEL = 0, 1, 2

_DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


def index_root(shard: str, index_dir: str | None, rules: Rules) -> Path:
    """The folder that holds the index folders of all shards beside this one."""
    parent = os.path.realpath(os.path.dirname(shard))
    kind: str = rules.require
    if rules.max_pixels != MAX_PIXELS:
        kind += f"-max{rules.max_pixels}"
    if index_dir is None:
        return Path(parent, ".kdengine", kind)
    digest = hashlib.sha256(os.fsencode(parent)).hexdigest()[:12]
    name = f"{os.path.basename(parent)}-{digest}"
    return Path(os.path.abspath(os.path.expanduser(index_dir)), name, kind)


def make_stamp(shard: str, rules: Rules) -> dict[str, Any]:
    """What an index depends on; an index with another stamp is stale."""
    size: int
    mtime_ns: int | str
    try:
        if os.path.isdir(shard):
            size, mtime_ns = fingerprint(shard)
        else:
            status = os.stat(shard)
            size, mtime_ns = status.st_size, status.st_mtime_ns
    except FileNotFoundError:
        size, mtime_ns = -1, -1
    return {
        "format": FORMAT,
        "size": size,
        "mtime_ns": mtime_ns,
        "max_pixels": rules.max_pixels,
        "require": rules.require,
        "dali": dali_version(),
    }


@functools.cache
def dali_version() -> str:
    """Version of DALI, found without importing it."""
    for package in _DALI_PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise RuntimeError(
        "index: DALI is not installed, and only its decoder can say which images are good. "
        "Run: pip install nvidia-dali-cuda130"
    )


def load_meta(folder: Path) -> dict[str, Any] | None:
    """The description of a shard's index, or None if it is absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        complete = all(
            (folder / name).stat().st_size == size for name, size in meta["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return meta if complete else None


def save_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Replace the description of a shard's index in one step."""
    temporary = folder / f"meta.json.{os.getpid()}"
    temporary.write_text(json.dumps(meta, indent=1), "utf-8")
    temporary.replace(folder / "meta.json")


def write_shard(
    shard: str, folder: Path, contents: ShardContents, stamp: dict[str, Any]
) -> dict[str, Any]:
    """Write the index of one shard, replacing an older one, and return its description."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = _temporary(folder.parent)
    scratch.mkdir()
    _write_quarantine(scratch, shard, contents)
    if contents.good:
        _write_good(scratch, contents.good)
        if contents.classes is None:
            _write_idx(scratch, contents.good)
    meta = {
        "shard": shard,
        "generation": uuid.uuid4().hex,
        "stamp": stamp,
        "num_samples": len(contents.good),
        "content": content_digest(scratch),
        "num_quarantined": len(contents.bad),
        "num_captions": sum(len(sample.captions) for sample in contents.good),
        "causes": dict(Counter(sample.fault.cause for sample in contents.bad)),
        "fault": list(contents.fault) if contents.fault else None,
        "notes": dict(contents.notes),
        "classes": contents.classes,
        "files": {file.name: file.stat().st_size for file in scratch.iterdir()},
        "tokens": {},
    }
    save_meta(scratch, meta)
    # a folder cannot be renamed over another: for an instant there is none, which reads as stale
    if folder.exists():
        retired = _temporary(folder.parent)
        folder.rename(retired)
        scratch.rename(folder)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        scratch.rename(folder)
    return meta


def content_digest(folder: Path) -> str:
    """Equal for indexes of the same good samples at the same places with equal captions."""
    found = hashlib.sha256()
    for name in ("images.idx", "samples.npy", "keys.bin", "captions.npy", "captions.bin"):
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            found.update(f"{name} {len(data)}\n".encode() + data)
    return found.hexdigest()


def _write_quarantine(scratch: Path, shard: str, contents: ShardContents) -> None:
    rows: list[tuple[str | None, str, str]] = []
    if contents.fault is not None:
        rows.append((None, *contents.fault))
    rows += [(sample.key, *sample.fault) for sample in contents.bad]
    with open(scratch / QUARANTINE, "w", encoding="utf-8") as file:
        for key, cause, detail in rows:
            record = {"shard": shard, "key": key, "cause": cause, "detail": detail}
            file.write(json.dumps(record) + "\n")


def _write_idx(scratch: Path, good: Sequence[GoodSample]) -> None:
    with open(scratch / "images.idx", "w", encoding="ascii") as file:
        file.write(f"v1.2 {len(good)}\n")
        file.writelines(
            f"img {sample.offset} {sample.size} {number}\n" for number, sample in enumerate(good)
        )


def _write_good(scratch: Path, good: Sequence[GoodSample]) -> None:
    # names in a tar are bytes: those that are no UTF-8 come back as they were
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in good]
    captions = [caption.encode() for sample in good for caption in sample.captions]
    samples = np.full((len(good) + 1, 3), -1, np.int64)
    samples[:, KEY_START] = _starts(keys)
    samples[:, CAPTION_FIRST] = np.cumsum([0, *(len(sample.captions) for sample in good)])
    samples[:-1, LABEL] = [sample.label for sample in good]
    np.save(scratch / "samples.npy", samples)
    np.save(scratch / "captions.npy", _starts(captions))
    (scratch / "keys.bin").write_bytes(b"".join(keys))
    (scratch / "captions.bin").write_bytes(b"".join(captions))


def _starts(texts: list[bytes]) -> np.ndarray:
    return np.cumsum([0, *map(len, texts)], dtype=np.int64)


def write_root_quarantine(root: Path) -> None:
    """Renew ROOT/quarantine.jsonl from the parts of all its shards."""
    temporary = _temporary(root)
    with open(temporary, "wb") as file:
        for part in sorted(root.glob(f"*/{QUARANTINE}")):
            file.write(part.read_bytes())
    temporary.replace(root / QUARANTINE)


def _temporary(root: Path) -> Path:
    """A name that the next holder of the lock clears away if this process cannot."""
    return root / f".tmp-{uuid.uuid4().hex}"


@contextmanager
def locked(root: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the lock of an index folder; the system frees it when the process ends.

    Args:
        root: the folder, made if needed.
        say: told when another process has to be waited for.

    Raises:
        RuntimeError: the folder cannot be written, or its file system knows no locks.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise RuntimeError(
            f"index: the index must be written to {root}, which is not possible ({error}). "
            "Name a folder that can be written with --index-dir (in training --data.index-dir)"
        ) from error
    with lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that indexes into {root}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise RuntimeError(
                f"index: {root} lies on a file system without locks ({error}). "
                "Name a folder on a local disk with --index-dir (in training --data.index-dir)"
            ) from error
        for leftover in root.glob(".tmp-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        yield
