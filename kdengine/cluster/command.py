# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine cluster`` does: labels and centroids of embeddings, in files.

OUT/manifest.json                  counts, objective of every iteration, what was clustered
OUT/centroids.npy                  float32 [k, width], unit length
OUT/sizes.npy                      int64 [k], rows of each; none is 0
OUT/shards/SHARD-DIGEST/labels.npy int32 [n], in the order of the shard's index (for an array
                                   OUT/labels.npy)
             .../nearest.npy, cosines.npy, lse.npy
                                   of each row the nearest centroids and their softmax, see
                                   `targets.py`; not with a top of 0
OUT/state.pt                       where the iterations are, while they are not done
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.table import Table

from kdengine import ranks
from kdengine.cluster import folder, kmeans, targets
from kdengine.cluster.embeddings import (
    Embeddings,
    SomeEmbeddings,
    open_embeddings,
    partial_file,
    read_parts,
    write_parts,
)
from kdengine.data.progress import Progress
from kdengine.durable import sync
from kdengine.ranks import Ranks

STATE = "state.pt"
ROWS = ("labels", *targets.NAMES)
FILES = (
    *(STATE, f"{STATE}.partial", "centroids.npy", "sizes.npy", "shards"),
    *(name for row in ROWS for name in (f"{row}.npy", partial_file(row))),
)


def cluster_command(
    path: str | Path,
    out: str | Path,
    *,
    k: int,
    iterations: int = 20,
    tolerance: float = 1e-4,
    seed: int = 0,
    teacher: int = 0,
    top: int = targets.TOP,
    scale: float = targets.SCALE,
    keep: str | Path | None = None,
) -> Table | None:
    """Spherical k-means of embeddings, gone on with where an earlier call was interrupted.

    Args:
        path: see ``open_embeddings``.
        out: folder of the results.
        k: clusters; those that have no row in the end are left out.
        iterations: at most.
        tolerance: an iteration that lowers the objective by less than this share is the last.
        seed: of the rows that centroids start from.
        teacher: which of a cache's.
        top: nearest centroids to write of each row; 0 writes labels alone.
        scale: of their softmax, that of the teacher's logits.
        keep: what ``balance`` wrote of the same embeddings: centroids are those of the rows that
            stay, the others get the label of the nearest.

    Work: 2 N K D FLOP an iteration, shared by the ranks; once more in the end, and twice for the
    nearest, half of that in float64. Memory of a rank: centroids 4 K D bytes, sums 8 K D, a block
    of rows, 4 N for the labels in the end. Files: 4 bytes a row, and (8 m + 4) of the m nearest.

    Returns: what was found, for a person, on rank 0.

    Raises:
        ValueError: arguments or embeddings that cannot be used, or ``out`` holds other results.
    """
    out, embeddings = Path(out), open_embeddings(Path(path), teacher)
    kept = None if keep is None else _kept(Path(keep), embeddings)
    rows = embeddings if kept is None else SomeEmbeddings(embeddings, np.flatnonzero(kept))
    if not 1 <= k <= rows.num_rows:
        which = "" if kept is None else " that stay"
        raise ValueError(
            f"cluster: --k is between 1 and the number of rows{which}, {rows.num_rows}; got {k}"
        )
    me = ranks.join()
    wanted = {
        "embeddings": embeddings.digest,
        "keep": None if kept is None else _digest(kept),
        "k": k,
        "iterations": iterations,
        "tolerance": tolerance,
        "seed": seed,
        "top": top,
        "scale": scale,
    }
    lock = me.first_only(lambda: _begin(out, wanted), "cluster")
    done = me.broadcast((out / folder.MANIFEST).exists())
    if not done:
        _run(embeddings, rows, kept, out, wanted, me)
    if lock is None:
        return None
    lock.close()
    return table(out)


def _begin(out: Path, wanted: dict[str, Any]) -> IO[str]:
    """Lock the folder, and see that what it holds was asked for by the same words."""
    lock = folder.claim(out, "cluster", FILES)
    found = None
    if (out / folder.MANIFEST).exists():
        found = folder.read_manifest(out)["asked"]
    elif (out / STATE).exists():
        found = torch.load(out / STATE, weights_only=True)["asked"]
    if found is not None:
        folder.check_asked(out, "cluster", "clustering", found, wanted)
    return lock


def _kept(folder_of_balance: Path, embeddings: Embeddings) -> np.ndarray:
    """Whether each row stays, bool [N], as ``balance`` found."""
    told = folder.read_manifest(folder_of_balance)
    if told.get("command") != "balance" or told["embeddings"] != embeddings.digest:
        raise ValueError(
            f"cluster: expected what 'kdengine balance' wrote of the same embeddings, and "
            f"{folder_of_balance} is another result or of others; run 'kdengine balance' over these"
        )
    return read_parts(folder_of_balance, embeddings, "keep")


def _run(
    embeddings: Embeddings,
    rows: Embeddings,
    kept: np.ndarray | None,
    out: Path,
    wanted: dict[str, Any],
    me: Ranks,
) -> None:
    """Iterate over the rows that stay until it is done, and write the results of all."""
    saved = out / STATE
    # a file system of several machines may show it to some of them only
    if me.broadcast(saved.exists()):
        state = torch.load(saved, weights_only=True)
        state = kmeans.State(state["centroids"], state["objectives"], state["num_split"])
    else:
        state = kmeans.start(rows, wanted["k"], wanted["seed"])
    with Progress(me.first and sys.stderr.isatty()) as bars:

        def bar(title: str, total: int = embeddings.num_rows) -> kmeans.Advance:
            advance = bars.begin(title, "rows", total)
            # the ranks' shares are equal
            return lambda more: advance(more * me.world_size, more * me.world_size)

        while not is_done(state.objectives, wanted["iterations"], wanted["tolerance"]):
            title = f"iteration {len(state.objectives) + 1}"
            kmeans.iterate(rows, state, me, bar(title, rows.num_rows))
            if me.first:
                _save(saved, state, wanted)
            me.barrier()
        centroids, labels, objective = kmeans.final_labels(embeddings, state, me, bar("labels"))
        used = np.arange(len(centroids)) if kept is None else np.unique(labels[kept])
        if len(used) < len(centroids):
            # each has a row that stays
            state.centroids = centroids[used]
            centroids, labels, objective = kmeans.final_labels(embeddings, state, me, bar("labels"))
        top, scale = min(wanted["top"], len(centroids)), wanted["scale"]
        if top:
            rule = targets.Rule(centroids.to(me.device), top, scale)
            targets.write(out, embeddings, rule, me, bar(f"nearest {top}"))
    if not me.first:
        return
    np.save(out / "centroids.npy", centroids.numpy())
    np.save(out / "sizes.npy", np.bincount(labels, minlength=len(centroids)))
    write_parts(out, embeddings, "labels", labels)
    values = {
        "asked": wanted,
        "num_rows": embeddings.num_rows,
        "num_kept": rows.num_rows,
        "width": embeddings.width,
        "teacher": embeddings.teacher and dataclasses.asdict(embeddings.teacher),
        "k": len(centroids),
        "top": top,
        "scale": scale,
        "digest": _digest(labels, centroids.numpy(), np.array([top, scale])),
        "objective": objective,
        "objectives": state.objectives,
        "num_split": state.num_split,
    }
    folder.write_manifest(out, "cluster", values)
    saved.unlink(missing_ok=True)


def is_done(objectives: list[float], iterations: int, tolerance: float) -> bool:
    """Whether to stop: all iterations are made, or the last one changed next to nothing."""
    return len(objectives) >= iterations or has_converged(objectives, tolerance)


def has_converged(objectives: list[float], tolerance: float) -> bool:
    """Whether the last iteration lowered the objective by at most this share."""
    if len(objectives) < 2:
        return False
    return objectives[-2] - objectives[-1] <= tolerance * objectives[-2]


def _digest(*values: np.ndarray) -> str:
    found = hashlib.sha256()
    for each in values:
        found.update(np.ascontiguousarray(each).data)
    return found.hexdigest()


def _save(path: Path, state: kmeans.State, wanted: dict[str, Any]) -> None:
    partial = path.with_name(f"{STATE}.partial")
    torch.save({"asked": wanted, **vars(state)}, partial)
    sync(partial)
    os.replace(partial, path)


def table(out: Path) -> Table:
    """What a folder of clusters holds."""
    told, sizes = folder.read_manifest(out), np.load(out / "sizes.npy")
    found = Table(title=f"clusters {out}", show_header=False, title_justify="left")
    asked = told["asked"]["k"]
    of_kept = f", {told['num_kept']:,} of which stay" * (told["num_kept"] < told["num_rows"])
    lost = f", {asked - told['k']:,} of {asked:,} left out without a row" * (asked > told["k"])
    found.add_row("clusters", f"{told['k']:,} of {told['num_rows']:,} rows{of_kept}{lost}")
    quantiles = np.quantile(sizes, [0, 0.5, 1]).astype(int)
    found.add_row("rows in one", "least {:,}, median {:,}, most {:,}".format(*quantiles))
    if told["top"]:
        found.add_row("targets", f"{told['top']:,} nearest, softmax of scale {told['scale']:g}")
    filled = f"{sum(told['num_split']):,} empty clusters filled"
    objectives, tolerance = told["objectives"], told["asked"]["tolerance"]
    end = "the limit, not converged"
    if has_converged(objectives, tolerance):
        end = f"converged, the last lowered the objective by at most {tolerance:g} of it"
    found.add_row("iterations", f"{len(objectives)}, {end}; {filled}")
    cosine = 1 - told["objective"] / 2
    found.add_row(
        "objective", f"mean squared distance {told['objective']:.5f}, cosine {cosine:.5f}"
    )
    return found
