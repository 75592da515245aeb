# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine balance`` does: choose which images of a data set to train on.

    OUT/manifest.json                  what was asked for and found
    OUT/shards/SHARD-DIGEST/keep.npy   bool [n], in the order of the shard's index: whether it stays
    OUT/shards/SHARD-DIGEST/stands.npy int64 [n], number of the row that stays for each
    OUT/balance.svg                    sizes and widths of the sets, share kept at every threshold

For an array the files of rows lie in OUT itself. The same options again search nothing anew; other
ones are refused, since runs and clusters may point to the folder. Train with ``--data.keep OUT``.

Attested of CLIP-CID's image semantic balance, partly at second hand: Euclidean distance of
OpenCLIP ViT-bigG/14 embeddings, union-find, the central image of each set stays, 43.7 % of
LAION-400M go. The threshold, how pairs are found and all else is reconstructed. A threshold belongs
to an encoder and to a density: the same one joins more in more data, so it is calibrated on all
rows.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from kdengine.cluster import folder, picture
from kdengine.cluster.embeddings import Embeddings, open_embeddings, read_parts, write_parts
from kdengine.cluster.search import SAMPLE, Found, Search, Wanted, at_random
from kdengine.data.progress import Progress

FILES = ("shards", "keep.npy", "stands.npy", picture.PLOT, "removed.html")


def balance_command(
    path: str | Path,
    out: str | Path,
    wanted: Wanted,
    *,
    teacher: int = 0,
    shards: str | None = None,
    index_dir: str | None = None,
) -> Group:
    """Choose which rows of embeddings stay, and write it.

    Args:
        path: see ``open_embeddings``.
        out: folder of the results; what it holds of the same options is told again.
        wanted: what to keep.
        teacher: which of a cache's.
        shards: the data, for a page of removed images beside those that stay for them.
        index_dir: folder of its index.

    Returns: what was found, for a person.

    Raises:
        ValueError: arguments or embeddings that cannot be used, or ``out`` holds other things.
    """
    out, embeddings = Path(out), open_embeddings(Path(path), teacher)
    if shards is not None and wanted.rule == "random":
        raise ValueError(
            "balance: of what --rule random removes there is no page, nothing stands for it; leave "
            "--shards away"
        )
    asked = {"embeddings": embeddings.digest, **wanted.asked()}
    with folder.claim(out, "balance", FILES):
        is_made = (out / folder.MANIFEST).exists()
        if is_made:
            made = folder.read_manifest(out).get("asked", {})
            folder.check_asked(out, "balance", "result", made, asked)
        images = None
        if shards is not None:
            images = picture.open_images(embeddings, shards, index_dir)
        if not is_made:
            _choose(embeddings, out, wanted, asked)
        told, notes = folder.read_manifest(out), []
        if (plot := out / picture.PLOT).exists():
            notes.append(f"sizes and widths of the sets, and the share kept: {plot}")
        if images is not None:
            stands = read_parts(out, embeddings, "stands")
            page = picture.write_sheet(out, embeddings, stands, told, images)
            notes.append(f"removed images: {page}")
    notes.append(f"train with --data.keep {out}")
    return Group(table(out, told), *notes)


def _choose(embeddings: Embeddings, out: Path, wanted: Wanted, asked: dict[str, Any]) -> None:
    """Search, and write what was found."""
    with Progress(sys.stderr.isatty()) as bars:
        if wanted.rule == "random":
            found, count = at_random(embeddings.num_rows, wanted), 0
        else:
            search = Search(embeddings, wanted, bars)
            found = search.by_sets() if wanted.rule == "sets" else search.by_cover()
            count = search.count
    # left by one that was interrupted
    for name in FILES:
        old = out / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    write_parts(out, embeddings, "keep", found.keep)
    write_parts(out, embeddings, "stands", found.stands)
    if found.sets is not None:
        picture.draw(out / picture.PLOT, found, embeddings.num_rows)
    told = {"asked": asked, **describe(embeddings, wanted, found, count)}
    folder.write_manifest(out, "balance", told)


def describe(embeddings: Embeddings, wanted: Wanted, found: Found, cells: int) -> dict[str, Any]:
    """The manifest."""
    told: dict[str, Any] = {
        "embeddings": embeddings.digest,
        "rule": wanted.rule,
        "seed": wanted.seed,
        "num_rows": embeddings.num_rows,
        "num_kept": int(found.keep.sum()),
        "retention": float(found.keep.mean()),
        "eps": found.eps,
        "cells": cells,
        "probes": wanted.probes if cells else 0,
        "num_pairs": found.num_pairs,
    }
    if found.recall is not None:
        told["recall_of_pairs"], told["recall_in_sets"] = found.recall
    if found.sets is not None and len(found.sets.sizes):
        sizes, diameters = found.sets.sizes, found.sets.diameters
        told |= {
            "num_sets": len(sizes),
            "largest_set": int(sizes.max()),
            "largest_diameter": float(diameters.max()),
            "median_diameter": float(np.median(diameters)),
            "share_of_sets_wider_than_eps": float((diameters >= (found.eps or 0)).mean()),
            "histogram": {str(n): int(np.sum(sizes == n)) for n in np.unique(sizes)},
        }
    return told


def table(out: Path, told: dict[str, Any]) -> Table:
    """What was found, for a person."""
    found = Table(title=f"balance {out}", show_header=False, title_justify="left")
    found.add_row("kept", f"{told['num_kept']:,} of {told['num_rows']:,}, {told['retention']:.2%}")
    if told["eps"] is not None:
        cosine = 1 - told["eps"] ** 2 / 2
        found.add_row("threshold", f"distance {told['eps']:.5f}, cosine {cosine:.5f}")
        how = f"in {told['cells']:,} cells, {told['probes']} more each" * bool(told["cells"])
        found.add_row("pairs", f"{told['num_pairs']:,} found {how or 'among all'}")
    if "recall_of_pairs" in told:
        both = (
            f"{told['recall_of_pairs']:.2%} of the pairs, {told['recall_in_sets']:.2%} in one set"
        )
        found.add_row("recall", f"{both}, by {SAMPLE:,} rows against all")
    if "num_sets" in told:
        largest = (
            f"the largest of {told['largest_set']:,}, up to {told['largest_diameter']:.3f} wide"
        )
        found.add_row("sets", f"{told['num_sets']:,}; {largest}")
        share = told["share_of_sets_wider_than_eps"]
        found.add_row("wider than eps", f"{share:.1%} of the sets, which chains of pairs join")
    return found
