# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint, read it back, export the student in it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import kdengine
from kdengine.checkpoint.folder import (
    ENGINE,
    FOLDER,
    FORMAT,
    MASKS,
    META,
    PARTIAL,
    STUDENT,
    centres_name,
    checkpoints,
    find,
    point,
    prune,
    read_meta,
    step_name,
)
from kdengine.checkpoint.state import State, random_state, set_random_state
from kdengine.config import RunConfig, to_dict
from kdengine.durable import sync, sync_tree
from kdengine.models import Student, TowerSpec, build_from_spec, export_student
from kdengine.models.export import run_label
from kdengine.ranks import Ranks


def save(
    engine: Any,
    run: Path,
    state: State,
    *,
    ranks: Ranks,
    loader: Any,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    student: TowerSpec,
    identity: Mapping[str, Any],
    masks: Mapping[str, Any] | None = None,
    centres: Mapping[str, Any] | None = None,
) -> Path | None:
    """Write a checkpoint; all ranks call it together.

    Args:
        engine: goes on from its own state.
        run: folder of the run.
        state: where the run stands.
        ranks: this process among all.
        loader: its position in the data.
        config: of the run.
        weights: of the student, as exports will have it; rank 0's count.
        student: what the weights are.
        identity: see ``check``.
        masks: the state of a student that is being pruned.
        centres: this rank's part of the clusters' centres.

    Communication: five barriers, and the engine's own.

    Returns:
        The folder of the checkpoint; None where this step has one already.
    """
    folder = run / FOLDER
    final = folder / step_name(state.step)
    if ranks.broadcast(final.exists()):
        return None
    partial = folder / f"{PARTIAL}{final.name}"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
    own = {"random": random_state(), "loader": loader.state_dict()}
    torch.save(own, partial / f"rank_{ranks.rank:05d}.pt")
    if centres:
        save_file(dict(centres), partial / centres_name(ranks.rank))
    if ranks.first:
        save_file(dict(weights), partial / STUDENT, metadata={"format": "pt"})
        if masks is not None:
            torch.save(masks, partial / MASKS)
        meta = {
            "format": FORMAT,
            "kdengine": kdengine.__version__,
            "state": dataclasses.asdict(state),
            "world_size": ranks.world_size,
            "identity": identity,
            "config": to_dict(config),
            "student": student.to_dict(),
        }
        (partial / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    ranks.barrier()
    if ranks.local_rank == 0:
        sync_tree(partial)
    ranks.barrier()
    if ranks.first:
        os.rename(partial, final)
        sync(folder)
        point(folder, final.name)
        prune(run, max(1, config.run.keep_last))
    ranks.barrier()
    return final


def load(
    engine: Any,
    path: Path,
    *,
    ranks: Ranks,
    loader: Any,
    pruning: Any | None = None,
    centres: Any | None = None,
) -> State:
    """Bring engine, data position and random states back to those of a checkpoint; all ranks.

    Nothing may draw random numbers between this call and the first step. ``pruning`` and
    ``centres`` get their ``load_state_dict`` called.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE, load_lr_scheduler_states=False)
        own = torch.load(path / f"rank_{ranks.rank:05d}.pt", weights_only=True)
        if pruning is not None:
            # AdamW's step counters stay where they are loaded, and on a GPU each is waited for
            masks = torch.load(path / MASKS, weights_only=True, map_location="cpu")
            pruning.load_state_dict(masks)
        if centres is not None and centres.state_dict():
            centres.load_state_dict(load_file(path / centres_name(ranks.rank)))
    except Exception as error:
        raise damaged(path, error) from error
    if loaded is None:
        raise RuntimeError(f"resume: DeepSpeed found nothing to load in {path / ENGINE}")
    loader.load_state_dict(own["loader"])
    set_random_state(own["random"])
    return State(**read_meta(path)["state"])


def saved_student(path: Path, *, grad_checkpointing: bool) -> Student | None:
    """The student of a checkpoint that was written behind its cut; None of any other.

    Its weights are random: the engine's state has them.
    """
    meta = read_meta(path)
    if not meta["state"].get("is_cut", False):
        return None
    spec = TowerSpec.from_dict(meta["student"])
    return Student(build_from_spec(spec, grad_checkpointing=grad_checkpointing), spec)


def damaged(path: Path, error: Exception) -> RuntimeError:
    """The error of a checkpoint that was complete when written and cannot be read."""
    others = [str(p) for p in checkpoints(path.parents[1]) if p != path]
    return RuntimeError(
        f"checkpoint: {path} cannot be read ({type(error).__name__}: {error}); "
        + (f"use an older one: {', '.join(others)}" if others else "there is no other one")
    )


def export_run(
    run: str | Path, out: str | Path, *, step: str = "latest", force: bool = False
) -> Path:
    """Write the student of a run's checkpoint as a folder that open_clip loads.

    Works offline, on CPU, in one process, whatever ZeRO stage and ranks wrote the checkpoint.

    Args:
        run: folder of the run, or of one checkpoint.
        out: folder to write.
        step: 'latest' or the number of a step.
        force: see ``models.export_student``.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    run = Path(run)
    path = run if (run / META).is_file() else find(run, step)
    if path is None:
        raise FileNotFoundError(
            f"run {run}: no checkpoint in {run / FOLDER}; expected the folder of a run that has "
            "saved at least once"
        )
    meta = read_meta(path)
    try:
        weights = load_file(path / STUDENT)
    except SafetensorError as error:
        raise damaged(path, error) from error
    student = TowerSpec.from_dict(meta["student"])
    return export_weights(
        weights, student, out, path.resolve().parents[1], State(**meta["state"]), force=force
    )


def export_weights(
    weights: Mapping[str, Tensor],
    student: TowerSpec,
    out: str | Path,
    run: Path,
    state: State,
    *,
    force: bool = False,
) -> Path:
    """Write a student of a run as it stands as a folder; see ``models.export_student``."""
    notes = {
        "run": run_label(run),
        "step": state.step,
        "samples_seen": state.samples_seen,
    }
    return export_student(weights, student, out, force=force, notes=notes)
