# SPDX-License-Identifier: Apache-2.0
"""The samples of a tar archive: which members belong together, and where their bytes lie.

Decisions:
* The extension is what follows the last dot of the name, in any case; the key is the rest with its
  folders, without a leading `./`. So `photo.v2.final.jpg` has the key `photo.v2.final`.
* Names are only names (nothing is ever extracted): `../x` and `/x` are kept as they are.
* Members of one key need not be adjacent. A member whose extension its sample already has begins
  another sample of the same key, which is a duplicate.
* A member with an unknown extension or none, a folder, and `._*` (macOS) are ignored and counted.
* A `.json` on its own with the key `K.suffix`, where K has an image (`K.syn.json`), is ignored too.
* A damaged header ends the archive: what comes after could be guessed at, and is not.
"""

from __future__ import annotations

import os
import struct
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from kdengine.data.causes import Fault

# of two images in one sample the one named first here is taken; the head is open_clip's order
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "jpe", "jfif", "bmp",
                    "gif", "tif", "tiff", "jp2", "jxl", "avif", "heic")  # fmt: skip
EXTENSIONS = {*IMAGE_EXTENSIONS, "txt", "json", "cls"}
LABELS_ONLY = "labels-only"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# what a damaged or hostile header makes tarfile raise, besides its own errors
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError,
                  IndexError, KeyError, struct.error)  # fmt: skip


class Member(NamedTuple):
    """Bytes of one member: offset and size in the archive; whether it is a plain, whole file."""

    offset: int
    size: int
    is_file: bool
    is_whole: bool


@dataclass
class Sample:
    """Members that share a key, by lower-case extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    is_duplicate: bool = False

    def image(self) -> Member | None:
        """The image member, by the order of `IMAGE_EXTENSIONS`."""
        found = (self.members[name] for name in IMAGE_EXTENSIONS if name in self.members)
        return next(found, None)

    def text(self, extension: str) -> Member | None:
        """The member of this extension if its bytes are there."""
        member = self.members.get(extension)
        return member if member and member.is_file and member.is_whole else None


class Archive(NamedTuple):
    """Samples in the order of the file, what is wrong with the file, and counts worth knowing.

    Counts: `ignored-members`, `ignored-images` (second images), `no-end-mark` (0 or 1),
    `labels-only` (samples with a label and no text).
    """

    samples: list[Sample]
    fault: Fault | None
    notes: Counter[str]


def scan_archive(path: str) -> Archive:
    """Read every member header of an archive; no member's bytes are read.

    Never raises for what is in the file: the fault says what is wrong, and the samples before the
    damage are returned.
    """
    builder = _Builder()
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            fault = _first_fault(file, size) or _read_members(file, size, builder)
    except FileNotFoundError:
        fault = Fault("archive-missing", "no such file")
    except OSError as error:
        fault = Fault("archive-unreadable", str(error))
    samples = builder.finish()
    if fault is None and builder.num_members == 0:
        fault = Fault("archive-no-members", f"{size} bytes, no member")
    return Archive(samples, fault, builder.notes)


def _first_fault(file: IO[bytes], size: int) -> Fault | None:
    head = file.read(16)
    file.seek(0)
    if size == 0:
        return Fault("archive-empty", "0 bytes")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return Fault("archive-compressed", f"{name}; decompress it first")
    return None


class _Headers(tarfile.TarFile):
    """A TarFile whose `next` raises why it stopped, where the original hides it."""

    def next(self) -> tarfile.TarInfo:
        assert self.fileobj is not None
        self.fileobj.seek(self.offset)
        return self.tarinfo.fromtarfile(self)


def _read_members(file: IO[bytes], size: int, builder: _Builder) -> Fault | None:
    """Feed the members to the builder; the fault that ended the archive early, if any."""
    end = 0
    try:
        headers = _Headers(fileobj=file)
        member = headers.firstmember  # type: ignore[attr-defined]
        while True:
            is_whole = member.offset_data + member.size <= size or not member.isreg()
            builder.add(member, is_whole)
            if not is_whole:
                return Fault("archive-truncated", f"the file ends inside {member.name!r}")
            if headers.offset <= end:
                return Fault("archive-bad-header", f"{member.name!r} points backwards")
            end = headers.offset
            member = headers.next()
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return _trailing_fault(file)
    except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
        builder.notes["no-end-mark"] = 1
        return None
    except _HEADER_ERRORS as error:
        if builder.num_members == 0:
            return Fault("archive-not-tar", f"no tar header at the beginning ({error})")
        if end + tarfile.BLOCKSIZE > size:
            return Fault("archive-truncated", f"the file ends inside the header at byte {end}")
        return Fault("archive-bad-header", f"at byte {end}: {error or type(error).__name__}")


def _trailing_fault(file: IO[bytes]) -> Fault | None:
    position = file.tell()
    if any(file.read(tarfile.RECORDSIZE)):
        return Fault("archive-trailing-data", f"more data follows the end mark at byte {position}")
    return None


class _Builder:
    """Groups members into samples as they come."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self.num_members = 0
        self._samples: list[Sample] = []
        self._latest: dict[str, Sample] = {}

    def add(self, info: tarfile.TarInfo, is_whole: bool) -> None:
        self.num_members += 1
        if info.isdir():
            return
        name = info.name
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        base = name.rpartition("/")[2]
        stem, _, extension = base.rpartition(".")
        extension = extension.lower()
        if not stem or extension not in EXTENSIONS or base.startswith("._"):
            self.notes["ignored-members"] += 1
            return
        key = name[: -1 - len(extension)]
        sample = self._latest.get(key)
        if sample is None or extension in sample.members:
            sample = Sample(key, is_duplicate=sample is not None)
            self._latest[key] = sample
            self._samples.append(sample)
        is_file = info.isreg() and not info.issparse()
        sample.members[extension] = Member(info.offset_data, info.size, is_file, is_whole)

    def finish(self) -> list[Sample]:
        with_image = {sample.key for sample in self._samples if sample.image()}
        kept = []
        for sample in self._samples:
            num_images = sum(name in IMAGE_EXTENSIONS for name in sample.members)
            self.notes["ignored-images"] += max(0, num_images - 1)
            if sample.members.keys() == {"json"} and _owner(sample.key) in with_image:
                self.notes["ignored-members"] += 1
            else:
                kept.append(sample)
                names = sample.members.keys()
                self.notes[LABELS_ONLY] += "cls" in names and names.isdisjoint({"txt", "json"})
        self.notes += Counter()  # drops zero counts
        return kept


def _owner(key: str) -> str:
    return key.rpartition(".")[0]
