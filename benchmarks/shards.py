# SPDX-License-Identifier: Apache-2.0
"""The pairs that the benchmarks of the loader and of the step read."""

import os
from pathlib import Path

from benchmarks.common import REPOSITORY
from kdengine.demo.shards import Sizes, render_data

PHOTOS = "flickr8k-train-{000..008}.tar"
SCENES = "scenes-train-{000..007}.tar"
# rendered data, indexes and models of the benchmarks; not in the repository
SCRATCH = REPOSITORY / "runs" / "bench"


def training_shards(given: str | None, scratch: Path, sizes: Sizes | None = None) -> str:
    """The shards given; else Flickr8k where ``KDENGINE_TEST_DATA`` has it; else rendered scenes.

    Args:
        given: shards as ``--data.train-data`` takes them, or None.
        scratch: where scenes are rendered, once.
        sizes: how many scenes.
    """
    if given:
        return given
    folder = Path(os.environ.get("KDENGINE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if (folder / PHOTOS.replace("{000..008}", "000")).is_file():
        return str(folder / PHOTOS)
    print(f"no {PHOTOS} in {folder} (KDENGINE_TEST_DATA names the folder): scenes are rendered")
    scratch.mkdir(parents=True, exist_ok=True)
    render_data(scratch / "data", 0, sizes)
    shards = SCENES if sizes is None else f"scenes-train-{{000..{sizes.num_shards - 1:03}}}.tar"
    return str(scratch / "data" / shards)
