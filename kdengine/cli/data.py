# SPDX-License-Identifier: Apache-2.0
"""Commands that make training data ready."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from kdengine import MAX_PIXELS
from kdengine.cli.shared import print_table


def index(
    shards: Annotated[
        Positional[tuple[str, ...]], arg(metavar="SHARDS", help_behavior_hint="(required)")
    ],
    /,
    *,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    tokenizers: tuple[str, ...] = ("simple:77",),
    max_pixels: int = MAX_PIXELS,
    require: Literal["caption", "label"] = "caption",
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
) -> int:
    """Check every sample of the shards once and write the index that training reads.

    With --require label, a folder with a folder of images for each class may stand for the shards.

    Args:
        shards: Files, braces ('/data/{00000..00331}.tar'), or a folder: all .tar files directly in
            it; several may be joined by '::'.
        index_dir: Folder for the index; by default beside the shards.
        tokenizers: Tokenizers whose token ids are stored, as 'simple:CONTEXT' or 'hf:NAME:CONTEXT'.
        max_pixels: An image whose header states more pixels is quarantined before any decode.
        require: What a sample needs beside its image: a caption, or the label of a class.
        workers: Processes; all cores by default.
    """
    if not shards:
        raise ValueError("index: expected shards, got none; name at least one .tar file")
    from kdengine.data import ensure_index, summary_table
    from kdengine.data.summary import no_good_sample

    found = ensure_index(
        "::".join(shards),
        index_dir=index_dir,
        tokenizers=tokenizers,
        max_pixels=max_pixels,
        require=require,
        num_workers=workers,
        progress=True,
    )
    print_table(summary_table(found))
    for path in found.quarantine_paths if found.num_quarantined else ():
        print(path)
    if not found.num_samples:
        print(f"error: index: {no_good_sample(found)}", file=sys.stderr)
    return 0 if found.num_samples else 1


def pack(
    csv: Annotated[Positional[Path], arg(metavar="CSV")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: Annotated[str | None, arg(metavar="CHARACTER", help_behavior_hint="")] = None,
    shard_size: int = 10_000,
) -> int:
    """Make img2dataset-style shards from a table of image paths and captions.

    Args:
        csv: Text table (comma or tab) with a header; image paths are relative to its folder.
        out: Folder for the shards.
        image_key: Column of the image paths.
        caption_key: Column of the captions.
        separator: Between columns; by default a tab where the header has one, else a comma.
        shard_size: Samples in a shard.
    """
    from kdengine.data import pack as pack_csv

    report = pack_csv(
        csv,
        out,
        image_key=image_key,
        caption_key=caption_key,
        separator=separator,
        shard_size=shard_size,
        progress=True,
    )
    print(report)
    return 0 if report.num_samples else 1
