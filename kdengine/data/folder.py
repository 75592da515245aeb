# SPDX-License-Identifier: Apache-2.0
"""The images of a folder that has one folder a class, as torchvision's ImageFolder takes it.

Decisions:
* A class is a folder directly below; its images lie in it at any depth. Hidden names (`.x`) and
  `._*` (macOS) are no classes and no images.
* An image is a file with an image's extension, in any case; its content is looked at later. Other
  files are ignored and counted.
* A link to a class folder or to an image is followed; a link to a folder further below is not, so
  that nothing goes in a circle.
* The order is that of the names as text. It says nothing about classes: a folder `10` comes before
  `2`, and who evaluates goes by the names.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from kdengine.data.archive import IMAGE_EXTENSIONS


class ImageFile(NamedTuple):
    """One image: its path below the folder, which is its key, and the number of its class."""

    key: str
    label: int


class Folder(NamedTuple):
    """Names of the class folders and all image files, both in the order of their names.

    Counts: `ignored-members`, files that are no image by their extension, or in no class.
    """

    classes: list[str]
    files: list[ImageFile]
    notes: Counter[str]


def has_classes(path: str) -> bool:
    """Whether the path is a folder with a folder in it that could be a class."""
    return os.path.isdir(path) and any(_class_names(path))


def scan_folder(path: str) -> Folder:
    """List the images of every class; no file is opened.

    Raises:
        OSError: a folder cannot be listed.
    """
    classes: list[str] = sorted(_class_names(path))
    images: list[ImageFile] = []
    with os.scandir(path) as entries:
        num_ignored = sum(_is_image(entry.name) and not entry.is_dir() for entry in entries)
    for label, name in enumerate(classes):
        top = os.path.join(path, name)
        for parent, folders, files in os.walk(top, onerror=_raise):
            folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
            below = os.path.relpath(parent, path)
            for file in sorted(files):
                if _is_image(file):
                    images.append(ImageFile(f"{below}/{file}", label))
                else:
                    num_ignored += 1
    return Folder(classes, images, +Counter({"ignored-members": num_ignored}))


def fingerprint(path: str) -> tuple[int, str]:
    """Bytes of all image files, and a digest of their names, sizes and times.

    Another digest means that an image or a class came, went or changed. A folder that cannot be
    listed has -1 bytes.
    """
    total, digest = 0, hashlib.sha256()
    try:
        folder = scan_folder(path)
    except OSError:
        return -1, ""
    for name in folder.classes:
        digest.update(os.fsencode(name) + b"\0")
    for key, _ in folder.files:
        try:
            status = os.stat(os.path.join(path, key))
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:
            size, mtime_ns = 0, -1
        total += size
        digest.update(os.fsencode(key) + f"\0{size} {mtime_ns}\0".encode())
    return total, digest.hexdigest()


def _class_names(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield entry.name


def _is_image(name: str) -> bool:
    stem, _, extension = name.rpartition(".")
    return bool(stem) and extension.lower() in IMAGE_EXTENSIONS and not name.startswith(".")


def _raise(error: OSError) -> None:
    raise error
