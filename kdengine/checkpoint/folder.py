# SPDX-License-Identifier: Apache-2.0
"""The folder of checkpoints: which are complete, which is the newest, what is cleaned away."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from kdengine.durable import sync

FOLDER, LATEST, ENGINE = "checkpoints", "latest", "engine"
META, STUDENT, MASKS = "run.json", "student.safetensors", "masks.pt"
FORMAT = 2
PREFIX, PARTIAL, DOOMED, SUPERSEDED = "step_", ".partial_", ".doomed_", "superseded_"


def step_name(step: int) -> str:
    """Folder name of the checkpoint of a step."""
    return f"{PREFIX}{step:08d}"


def centres_name(rank: int) -> str:
    """File of a rank's part of the clusters' centres."""
    return f"centres_{rank:05d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / FOLDER).glob(f"{PREFIX}*") if (path / META).is_file()]
    return sorted(found)


def find(run: Path, which: str) -> Path | None:
    """The checkpoint that ``which`` means: 'latest', a step, or the path of a checkpoint folder.

    'latest' is the newest complete one. The file of that name is for people: a kill between the
    rename of a checkpoint and the write of the file leaves it one behind.

    Returns:
        Its folder, or None for 'latest' when the run has no checkpoint.

    Raises:
        FileNotFoundError: the named checkpoint does not exist.
    """
    if which == "latest":
        return max(checkpoints(run), default=None)
    path = run / FOLDER / step_name(int(which)) if which.isdigit() else Path(which)
    if not (path / META).is_file():
        there = ", ".join(p.name for p in checkpoints(run)) or "none"
        raise FileNotFoundError(
            f"checkpoint: no checkpoint in {path} (no {META}); {run} has: {there}; give 'latest', "
            "the number of a step, or the path of a step_* folder"
        )
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What ``run.json`` of a checkpoint says."""
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise ValueError(
            f"checkpoint: {path} has format {meta['format']}, this version reads {FORMAT}; use the "
            "version that wrote it"
        )
    return meta


def clean(run: Path, step: int | None) -> list[str]:
    """Mend what a killed run left behind; for rank 0, before training.

    Removes partial folders, lets ``latest`` name the newest complete checkpoint, and, when the run
    resumes from ``step``, renames later checkpoints.

    Returns:
        One sentence for each thing that was done to complete checkpoints.
    """
    folder, said = run / FOLDER, []
    for pattern in (PARTIAL, DOOMED):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path)
    for path in checkpoints(run):
        if step is not None and path.name > step_name(step):
            aside = path.with_name(f"{SUPERSEDED}{path.name}_{time.strftime('%Y%m%d-%H%M%S')}")
            path.rename(aside)
            said.append(f"{path.name} belongs to the abandoned history; renamed to {aside.name}")
    newest = max(checkpoints(run), default=None)
    if newest is not None:
        point(folder, newest.name)
    return said


def point(folder: Path, name: str) -> None:
    """Let ``latest`` name a checkpoint; the file is replaced as a whole."""
    partial = folder / f".{LATEST}.partial"
    partial.write_text(name + "\n", encoding="utf-8")
    sync(partial)
    os.replace(partial, folder / LATEST)
    sync(folder)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; a half removed one is never seen as complete."""
    for path in checkpoints(run)[:-keep]:
        doomed = path.with_name(f"{DOOMED}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
