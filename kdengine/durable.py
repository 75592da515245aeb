# SPDX-License-Identifier: Apache-2.0
"""What has been written is on the disk, before a rename makes it count."""

import os
from pathlib import Path


def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
