# SPDX-License-Identifier: Apache-2.0
"""What has been written is on the disk, before a rename makes it count; who may write."""

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK = ".lock"


def hold(command: str, folder: Path) -> IO[str]:
    """The lock of a folder that a command fills, held until it is closed.

    Raises:
        OSError: the lock cannot be made.
        RuntimeError: another command holds it.
    """
    lock = open(folder / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(
            f"{command}: another command fills {folder}; wait for it, or name another folder"
        ) from error
    return lock


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
