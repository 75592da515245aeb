# SPDX-License-Identifier: Apache-2.0
"""A folder of results: locked while it is filled, described by a manifest that is written last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from kdengine.durable import LOCK, hold

MANIFEST = "manifest.json"
FORMAT = 1


def claim(out: Path, command: str, known: tuple[str, ...] = ()) -> IO[str]:
    """Make the folder and lock it; what lies in it must be a result of this command.

    Args:
        out: the folder.
        command: which of ours fills it.
        known: files that an unfinished one leaves.

    Returns: the lock, held until it is closed.

    Raises:
        ValueError: the folder cannot be made, or holds something else.
        RuntimeError: another command fills it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(command, out)
    except OSError as error:
        raise ValueError(
            f"{command}: expected a folder that can be written, got {out} ({error.strerror}); name "
            "another"
        ) from None
    others = {path.name for path in out.iterdir()} - {LOCK, *known}
    found = read_manifest(out) if MANIFEST in others else {}
    if others and found.get("command") != command:
        raise ValueError(
            f"{command}: {out} is not empty and holds no result of 'kdengine {command}'; name a "
            "new folder"
        )
    return lock


def check_asked(
    out: Path, command: str, what: str, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """See that what the folder holds was asked for by the same options.

    Raises:
        ValueError: it was not; the message names those that differ.
    """
    other = [
        f"{name if name == 'embeddings' else f'--{name}'} {_short(found.get(name))}, not "
        f"{_short(wanted[name])}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if other:
        raise ValueError(
            f"{command}: {out} holds another {what}: {'; '.join(other)}; give the options it was "
            "made with, or another folder"
        )


def _short(value: Any) -> str:
    """An option's value for a person: of a digest the beginning."""
    if value is None:
        return "none"
    text = str(value)
    return text[:12] if len(text) == 64 else text


def write_manifest(out: Path, command: str, values: dict[str, Any]) -> None:
    """Write the description in one step."""
    told = {"format": FORMAT, "command": command, **values}
    partial = out / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out / MANIFEST)


def read_manifest(out: Path) -> dict[str, Any]:
    """The description of a folder of results.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    path = out / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{out}: expected a folder of results, it has no {MANIFEST}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"it is of format {found['format']}, this version reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; make it anew") from None
    return found
