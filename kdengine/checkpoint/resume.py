# SPDX-License-Identifier: Apache-2.0
"""From where a run starts, and whether it may go on from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdengine.checkpoint.folder import STUDENT, checkpoints, find, read_meta
from kdengine.config import RunConfig, to_dict
from kdengine.log import METRICS
from kdengine.ranks import Ranks

# what a resumed run may change: nothing here touches the numbers of a step, and the places of data,
# teacher and engine file matter less than what is in them (``IDENTITY``)
FREE = (
    "run.",
    "eval.retrieval",
    "eval.zeroshot",
    "eval.val_frequency",
    "eval.batch_size",
    "data.workers",
    "data.index_dir",
    "data.train_data",
    "data.keep",
    "distill.distill_model",
    "distill.distill_pretrained",
    "distill.cache",
    "method.clip_cid.clusters",
    "train.deepspeed_config",
    "train.max_skipped",
)
IDENTITY = {
    "num_samples": "the number of training samples",
    "shards": "the training shards (names, sizes, samples)",
    "teacher": "the teacher's weights",
    "clusters": "the clusters of the training samples",
    "engine": "DeepSpeed's configuration",
}
# these stretch the schedule of the learning rate, and are announced
LENGTH = ("train.steps", "train.epochs")


def starting_point(run: Path, resume: str | None, ranks: Ranks) -> Path | None:
    """The checkpoint to start from, None for a new run; all ranks agree or fail together.

    ``latest`` in a run without a checkpoint means a new run, so that a job that a scheduler
    restarts needs one command only.

    Args:
        run: folder of the run.
        resume: None, 'latest', a step, or the path of a checkpoint.
        ranks: this process among all; rank 0 looks.

    Raises:
        FileExistsError: a new run, but the folder holds another one.
        FileNotFoundError: the named checkpoint does not exist.
    """
    found: Path | OSError | None = None
    if ranks.first:
        try:
            if resume:
                found = find(run, resume)
            elif (run / METRICS).exists() or checkpoints(run):
                raise FileExistsError(
                    f"run: {run} holds a run already; go on with --resume latest, choose another "
                    "--run.name, or remove the folder"
                )
        except OSError as error:
            found = error
    found = ranks.broadcast(found)
    if isinstance(found, OSError):
        raise found
    return found


def differences(meta: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ from a checkpoint's configuration: name -> (there, here).

    A field that is younger than the checkpoint had its default.
    """
    defaults, here = (_flat(json.loads(json.dumps(to_dict(c)))) for c in (RunConfig(), config))
    there = defaults | _flat(meta["config"])
    return {
        name: (there.get(name), here.get(name))
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not name.startswith(FREE)
    }


def check(path: Path, config: RunConfig, ranks: Ranks, identity: Mapping[str, Any]) -> list[str]:
    """Refuse to resume into another run; see ``FREE`` for what may change.

    Args:
        path: the checkpoint.
        config: of this run.
        ranks: this process among all.
        identity: contents of data, teacher and engine file, by the names of ``IDENTITY``.

    Returns:
        Sentences on changes that are allowed and worth knowing.

    Raises:
        ValueError: world size, data or configuration differ; the message names what.
    """
    meta = read_meta(path)
    if meta["world_size"] != ranks.world_size:
        weights = f"--model.pretrained {path / STUDENT}"
        if "ragged" in meta["student"]["model_cfg"]:
            weights = f"'kdengine export {path} OUT' and --model.model local-dir:OUT"
        raise ValueError(
            f"resume: {path} was written by {meta['world_size']} ranks, this run has "
            f"{ranks.world_size}; the data position and the ZeRO shards belong to a rank: start "
            f"{meta['world_size']} ranks, or start a new run from its weights with {weights}"
        )
    changed = differences(meta, config)
    notes = []
    for name in LENGTH:
        if name in changed:
            there, here = changed.pop(name)
            notes.append(f"{name} was {there}, is {here}: the learning rate follows the new length")
    if changed:
        told = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in changed.items())
        raise ValueError(
            f"resume: the configuration differs from that of {path}: {told}; give the same "
            "values, or start a new run with another --run.name"
        )
    there = meta["identity"]
    for name, what in IDENTITY.items():
        if there.get(name) != identity.get(name):
            told = f": {there[name]} became {identity[name]}" if name == "num_samples" else ""
            if name == "engine":
                keys = there[name].keys() | identity[name].keys()
                names = sorted(k for k in keys if there[name].get(k) != identity[name].get(k))
                told = f" ({', '.join(names)})"
            raise ValueError(
                f"resume: {what} changed since {path}{told}; give the same, or start a new run "
                "with another --run.name"
            )
    return notes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
