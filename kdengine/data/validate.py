# SPDX-License-Identifier: Apache-2.0
"""Validate every sample of one shard or folder: image, caption or label, unique key."""

from __future__ import annotations

import functools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kdengine.data.archive import LABELS_ONLY, Member, Sample, scan_archive
from kdengine.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    parse_label,
    sample_captions,
)
from kdengine.data.causes import Fault
from kdengine.data.decode import MAX_BATCH, Check, find_failures
from kdengine.data.folder import ImageFile, scan_folder
from kdengine.data.imageheader import check_header
from kdengine.data.progress import counted

Require = Literal["caption", "label"]

# what one batch of images may hold decoded, 100 MB; a single larger image is a batch of its own
BATCH_PIXELS = 2**25
# an 8-bit image in its largest form: uncompressed with alpha, and a little for the headers
BYTES_PER_PIXEL = 4
HEADER_BYTES = 2**20


class Rules(NamedTuple):
    """What makes a sample good; another choice makes another index."""

    max_pixels: int
    require: Require


class GoodSample(NamedTuple):
    """A sample to train on: where its image lies, its captions (may be none with labels).

    In a folder the key is the path of the image and the label the number of its class folder.
    """

    key: str
    offset: int
    size: int
    captions: list[str]
    label: int


class BadSample(NamedTuple):
    """A quarantined sample."""

    key: str
    fault: Fault


@dataclass
class ShardContents:
    """Everything known about one shard or folder; good and bad samples are all samples.

    `classes` are the names of a folder's class folders, by number; None for a shard.
    """

    good: list[GoodSample] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    fault: Fault | None = None
    notes: Counter[str] = field(default_factory=Counter)
    classes: list[str] | None = None


# looks at a sample by its position, up to the point where only a decoder can still condemn it
_Inspect = Callable[[int, Any], "_Candidate | Fault"]


class _Candidate(NamedTuple):
    position: int
    sample: GoodSample
    image: bytes
    num_pixels: int


def validate_shard(
    path: str,
    rules: Rules,
    check: Check,
    advance: Callable[[int, int], None] = lambda num_samples, num_bytes: None,
    part: tuple[int, int] = (0, 1),
) -> ShardContents:
    """Read a shard once and tell its good samples from its bad ones.

    Args:
        path: the tar archive, or a folder of class folders.
        rules: what a good sample is.
        check: decides whether a batch of encoded images decodes.
        advance: called with the samples and bytes that were dealt with since the last call.
        part: (k, n) looks at the k-th of n parts of the samples only; see `merge`.

    Memory: one batch of images, and the captions of the part.
    """
    if os.path.isdir(path):
        return _validate_folder(path, rules, check, advance, part)
    archive = scan_archive(path)
    if rules.require == "label":
        # nothing is missing from them
        del archive.notes[LABELS_ONLY]
    contents = ShardContents(fault=archive.fault, notes=archive.notes)
    samples = _part(archive.samples, part)
    if samples:
        with open(path, "rb", buffering=0) as file:
            inspect = functools.partial(_inspect, file.fileno(), rules)
            _judge(samples, inspect, check, advance, contents)
    return contents


def _validate_folder(
    path: str,
    rules: Rules,
    check: Check,
    advance: Callable[[int, int], None],
    part: tuple[int, int],
) -> ShardContents:
    try:
        folder = scan_folder(path)
    except OSError as error:
        return ShardContents(fault=Fault("archive-unreadable", str(error)), classes=[])
    contents = ShardContents(notes=folder.notes, classes=folder.classes)
    if not folder.files:
        several = counted(len(folder.classes), "class folder")
        contents.fault = Fault("archive-no-members", f"{several}, no image")
    inspect = functools.partial(_inspect_file, path, rules)
    _judge(_part(folder.files, part), inspect, check, advance, contents)
    return contents


def _part(samples: Sequence[Any], part: tuple[int, int]) -> Sequence[Any]:
    number, num_parts = part
    begin, end = (len(samples) * (number + i) // num_parts for i in (0, 1))
    return samples[begin:end]


def _judge(
    samples: Sequence[Any],
    inspect: _Inspect,
    check: Check,
    advance: Callable[[int, int], None],
    contents: ShardContents,
) -> None:
    """Divide the samples into the good and the bad ones of the contents."""
    verdicts: list[GoodSample | BadSample | None] = [None] * len(samples)
    done = 0
    for batch in _batches(_candidates(samples, inspect, verdicts)):
        failures = find_failures([candidate.image for candidate in batch], check)
        for number, candidate in enumerate(batch):
            verdicts[candidate.position] = (
                BadSample(candidate.sample.key, failures[number])
                if number in failures
                else candidate.sample
            )
        reached = batch[-1].position + 1
        advance(reached - done, sum(len(candidate.image) for candidate in batch))
        done = reached
    advance(len(verdicts) - done, 0)
    contents.good = [verdict for verdict in verdicts if isinstance(verdict, GoodSample)]
    contents.bad = [verdict for verdict in verdicts if isinstance(verdict, BadSample)]


def merge(parts: Sequence[ShardContents]) -> ShardContents:
    """The contents of a shard from those of all its parts, in their order."""
    contents = ShardContents(fault=parts[0].fault, notes=parts[0].notes, classes=parts[0].classes)
    for part in parts:
        contents.good += part.good
        contents.bad += part.bad
    if contents.bad and not contents.good and contents.fault is None:
        contents.fault = Fault("archive-no-good-sample", f"{len(contents.bad)} samples, all bad")
    return contents


def _candidates(
    samples: Sequence[Any],
    inspect: _Inspect,
    verdicts: list[GoodSample | BadSample | None],
) -> Iterator[_Candidate]:
    """The samples that only a decoder can still condemn; verdicts on the others are written."""
    for position, sample in enumerate(samples):
        try:
            found = inspect(position, sample)
        except OSError as error:
            found = Fault("member-unreadable", str(error))
        if isinstance(found, Fault):
            verdicts[position] = BadSample(sample.key, found)
        else:
            yield found


def _inspect(fd: int, rules: Rules, position: int, sample: Sample) -> _Candidate | Fault:
    member = sample.image()
    fault = _member_fault(sample, member, rules.max_pixels)
    if fault is not None or member is None:
        return fault or Fault("image-missing", "no image member")
    image = os.pread(fd, member.size, member.offset)
    header = check_header(image, rules.max_pixels)
    if isinstance(header, Fault):
        return header
    captions = sample_captions(
        _read(fd, sample.text("txt"), MAX_CAPTION_BYTES + 4),
        _read(fd, sample.text("json"), MAX_JSON_BYTES),
    )
    label = _label(_read(fd, sample.text("cls"), 1024))
    needed = captions if rules.require == "caption" else label
    if isinstance(needed, Fault):
        return needed
    good = GoodSample(
        sample.key,
        member.offset,
        member.size,
        captions if isinstance(captions, list) else [],
        label if isinstance(label, int) else -1,
    )
    return _Candidate(position, good, image, header.width * header.height)


def _inspect_file(root: str, rules: Rules, position: int, file: ImageFile) -> _Candidate | Fault:
    path = os.path.join(root, file.key)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        return Fault("file-name", f"character {error.start + 1} of the path")
    # a pipe or a device could be opened and never end
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return Fault("image-link", "not a plain file")
    if fault := _size_fault(status.st_size, rules.max_pixels):
        return fault
    with open(path, "rb") as opened:
        image = opened.read()
    header = check_header(image, rules.max_pixels)
    if isinstance(header, Fault):
        return header
    good = GoodSample(file.key, 0, len(image), [], file.label)
    return _Candidate(position, good, image, header.width * header.height)


def _member_fault(sample: Sample, member: Member | None, max_pixels: int) -> Fault | None:
    if sample.is_duplicate:
        return Fault("duplicate-key", "the first sample of this key is the one that counts")
    if member is None:
        return Fault("image-missing", "members: ." + " .".join(sample.members))
    if not member.is_file:
        return Fault("image-link", "the image member is not a plain file")
    if not member.is_whole:
        return Fault("image-truncated", "the archive ends inside the image")
    return _size_fault(member.size, max_pixels)


def _size_fault(num_bytes: int, max_pixels: int) -> Fault | None:
    if num_bytes > max_pixels * BYTES_PER_PIXEL + HEADER_BYTES:
        return Fault("image-bytes", f"{num_bytes} bytes, too many for {max_pixels} pixels")
    return None


def _read(fd: int, member: Member | None, limit: int) -> bytes | None:
    """The member's bytes, of an oversized one a byte more than the limit; None without member."""
    return None if member is None else os.pread(fd, min(member.size, limit + 1), member.offset)


def _label(data: bytes | None) -> int | Fault:
    return Fault("label-missing", "no .cls member") if data is None else parse_label(data)


def _batches(candidates: Iterator[_Candidate]) -> Iterator[list[_Candidate]]:
    batch: list[_Candidate] = []
    num_pixels = 0
    for candidate in candidates:
        num_pixels += candidate.num_pixels
        if batch and (len(batch) == MAX_BATCH or num_pixels > BATCH_PIXELS):
            yield batch
            batch, num_pixels = [], candidate.num_pixels
        batch.append(candidate)
    if batch:
        yield batch
