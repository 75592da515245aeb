# SPDX-License-Identifier: Apache-2.0
"""Folders that `kdengine balance` and `kdengine cluster` wrote, as training reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_manifest(who: str, folder: Path, command: str) -> dict[str, Any]:
    """What a folder says of itself, which is written last.

    Args:
        who: wants it, for messages.
        folder: of results.
        command: that is to have written it.

    Raises:
        FileNotFoundError: there is no folder, or it is not finished.
        ValueError: it is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{who}: {folder} is no folder; expected what 'kdengine {command}' wrote"
        )
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: {folder} has no manifest.json: 'kdengine {command}' has not finished it; run "
            "it again"
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}: {path} cannot be read: {error}; make it anew") from None
    return told if isinstance(told, dict) else {}
