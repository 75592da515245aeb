# SPDX-License-Identifier: Apache-2.0
"""From a shard list as people write it (braces, `::`, folders) to local paths."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from kdengine.data.folder import has_classes

MAX_SHARDS = 1_000_000

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(spec: str | Sequence[str]) -> list[str]:
    """Absolute paths of the shards that a specification names, in its order.

    A specification is a path, or several joined by `::`, or a sequence of such. A path may hold
    braces (`{00000..00331}`, `{a,b}`), shell wildcards (sorted), `~`, or be a folder: all its
    `*.tar`, sorted, or the folder itself where it holds none but folders (one a class). A path
    named twice stays twice: that is how a shard is upsampled. Whether a file exists is not asked
    here.

    Raises:
        ValueError: no shard is named, the specification is remote, or it names too many.
        FileNotFoundError: a folder or a wildcard holds no shard.
    """
    paths: list[str] = []
    for path in _named(spec):
        paths.extend(_local(path))
        if len(paths) > MAX_SHARDS:
            raise ValueError(_too_many(str(spec)))
    if not paths:
        raise ValueError(
            f"shards: expected at least one shard; got {spec!r}. Give paths of .tar files, for "
            "example '/data/cc3m/{00000..00331}.tar'"
        )
    return paths


def existing(spec: str | Sequence[str]) -> list[str]:
    """`expand`, refusing shards of which none exists: a few of many may be missing.

    Raises:
        ValueError: see `expand`.
        FileNotFoundError: see `expand`, or there is not one of the files.
    """
    paths = expand(spec)
    if not any(os.path.exists(path) for path in paths):
        several = f"none of the {len(paths)} shards exists; the first is {paths[0]}"
        raise FileNotFoundError(
            f"shards: {several if len(paths) > 1 else f'there is no file {paths[0]}'}"
        )
    return paths


def folders_told(spec: str | Sequence[str]) -> list[str]:
    """What a specification takes of folders, a sentence for each: their names say less than files'.

    Raises:
        ValueError, FileNotFoundError: see `expand`.
    """
    told = []
    for path in dict.fromkeys(_named(spec)):
        # thousands of files need not be looked at for this
        found = [] if path.endswith(".tar") or not os.path.isdir(path) else _local(path)
        if found not in ([], [path]):
            found = [os.path.basename(tar) for tar in found]
            which = f"{found[0]} to {found[-1]}" if len(found) > 1 else found[0]
            files = "the only .tar file" if len(found) == 1 else f"all {len(found):,} .tar files"
            told.append(f"{files} directly in {path}, {which}")
    return told


def _named(spec: str | Sequence[str]) -> Iterator[str]:
    """Absolute paths of the files, folders and wildcards that a specification names."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    for part in (part for text in specs for part in os.fspath(text).split("::")):
        if not part.strip():
            continue
        for path in [part] if os.path.exists(part) else _unfold(part):
            _refuse_remote(path)
            yield os.path.abspath(os.path.expanduser(path))


def _too_many(part: str) -> str:
    return (
        f"shards: at most {MAX_SHARDS} shards are allowed; {part!r} names more. "
        "Check the range in the braces"
    )


def _refuse_remote(part: str) -> None:
    if part.startswith("pipe:") or _SCHEME.match(part):
        raise ValueError(
            f"shards: they must be local files; got {part!r}. Mount the remote storage (for "
            "example with s3fs, gcsfuse or rclone mount) or copy the shards to a local disk first"
        )


def _unfold(text: str) -> Iterator[str]:
    """Brace expansion; braces with neither a range nor a comma are plain characters."""
    start = text.find("{")
    while start >= 0:
        end, commas = _group(text, start)
        choices = _choices(text, start, end, commas)
        if choices is not None:
            for choice in choices:
                for middle in _unfold(choice):
                    for tail in _unfold(text[end + 1 :]):
                        yield text[:start] + middle + tail
            return
        start = text.find("{", start + 1)
    yield text


def _group(text: str, start: int) -> tuple[int, list[int]]:
    """Where the brace opened at start closes (-1: never), and the commas on its own level."""
    depth, commas = 0, []
    for position in range(start, len(text)):
        character = text[position]
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 1:
            commas.append(position)
        if depth == 0:
            return position, commas
    return -1, []


def _choices(text: str, start: int, end: int, commas: list[int]) -> Iterator[str] | None:
    if end < 0:
        return None
    if commas:
        edges = [start, *commas, end]
        return (text[low + 1 : high] for low, high in itertools.pairwise(edges))
    numbers = _RANGE.fullmatch(text[start + 1 : end])
    if not numbers:
        return None
    first, last = numbers[1], numbers[2]
    padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= MAX_SHARDS:
        raise ValueError(_too_many(text))
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def _local(path: str) -> list[str]:
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found and path != os.sep and has_classes(path):
            return [path]
        missing = f"shards: the folder {path} holds no .tar file. Is it the right folder?"
    elif glob.has_magic(path) and not os.path.exists(path):
        found = sorted(glob.glob(path))
        missing = f"shards: no file matches {path!r}. Check the pattern"
    else:
        return [path]
    if not found:
        raise FileNotFoundError(missing)
    return found
