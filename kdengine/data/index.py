# SPDX-License-Identifier: Apache-2.0
"""The index of a data set: which samples of which shards are good, and their captions.

A sample is good if its image is (an 8-bit JPEG, PNG, WebP or BMP by content, at most max_pixels by
its header, decoded by DALI's CPU decoder), its caption is UTF-8 and not blank, and its key is the
first of its kind in the shard. In a folder with one folder a class every good image is a sample,
labelled by its class folder. All others are in `quarantine.jsonl` with their cause.
Keys are unique within a shard; the same key in two shards names two samples, because data sets that
are joined number their samples alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kdengine import MAX_PIXELS
from kdengine.data.build import Place, update
from kdengine.data.dataset import CaptionTable, DatasetIndex, ShardIndex
from kdengine.data.shards import existing, folders_told
from kdengine.data.store import index_root
from kdengine.data.validate import Require, Rules

__all__ = ["MAX_PIXELS", "CaptionTable", "DatasetIndex", "ShardIndex", "ensure_index"]


def ensure_index(
    shards: str | Sequence[str],
    *,
    index_dir: str | None = None,
    tokenizers: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    require: Require = "caption",
    num_workers: int | None = None,
    progress: bool = False,
    rebuild: bool = False,
) -> DatasetIndex:
    """Open the index of the shards, first building whatever is missing or stale.

    An index is stale when the size or time of its shard (of any image of a folder), the version of
    DALI or our format changed; token ids when the version of the tokenizer did. Another max_pixels
    or require is another index beside the first. Several processes may call this at once: one
    builds, the others wait for it and find the index done.

    Args:
        shards: see `expand`.
        index_dir: folder for the index; None is `.kdengine` beside the shards.
        tokenizers: ids (see `load_tokenizer`) whose token ids are wanted.
        max_pixels: an image whose header states more is quarantined before any decode.
        require: what a sample needs besides a good image: a caption, or a class number in `.cls`
            (class folders have only labels).
        num_workers: processes; None is one a core, 0 is to stay in this one.
        progress: show bars on stderr, and what is taken of a folder.
        rebuild: validate and tokenise all of it anew.

    Raises:
        FileNotFoundError: none of the shards exists.
        ValueError: the shards are remote or none, class folders come with other data or are to
            have captions, or an argument is out of range.
        RuntimeError: the index folder cannot be written.
    """
    _check(index_dir, max_pixels, require, num_workers)
    paths = existing(shards)
    _check_folder(paths, require)
    if progress:
        # before the hours that all of a folder may take
        for told in folders_told(shards):
            print(f"shards: {told}", file=sys.stderr)
    rules = Rules(max_pixels, require)
    places = [
        Place(path, index_root(path, index_dir, rules) / os.path.basename(path)) for path in paths
    ]
    stats = update(
        list(dict.fromkeys(places)),
        rules,
        list(dict.fromkeys(tokenizers)),
        num_workers=num_workers,
        progress=progress,
        rebuild=rebuild,
    )
    return DatasetIndex(places, stats)


def _check_folder(paths: Sequence[str], require: str) -> None:
    folder = next((path for path in paths if os.path.isdir(path)), None)
    if folder is None:
        return
    if len(paths) > 1:
        raise ValueError(
            f"shards: expected .tar files, or one folder of class folders; got the folder {folder} "
            f"among {len(paths)}; take it away, or make it a set of its own"
        )
    if require != "label":
        raise ValueError(
            f"shards: the folder {folder} holds no .tar file but other folders; if those are "
            "classes of images, they have labels and no captions: evaluate them with --zeroshot or "
            "--probe, index them with --require label"
        )


def _check(index_dir: str | None, max_pixels: int, require: str, num_workers: int | None) -> None:
    if index_dir is not None and not index_dir.strip():
        raise ValueError(
            "index: the index folder (--index-dir, in training --data.index-dir) is an empty text; "
            "name a folder, or leave the option away"
        )
    if max_pixels < 1:
        raise ValueError(
            "index: the limit on pixels (--max-pixels, in training --data.max-pixels) must be at "
            f"least 1; got {max_pixels}"
        )
    if require not in ("caption", "label"):
        raise ValueError(f"index: require is 'caption' or 'label'; got {require!r}")
    if num_workers is not None and num_workers < 0:
        raise ValueError(
            f"index: the number of processes (--workers) must be at least 0; got {num_workers}"
        )
