# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: seeds, the test data folder, and real gloo ranks."""

import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# set before any kernel is imported; a machine with a GPU runs the real thing
if "TRITON_INTERPRET" not in os.environ and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from kdengine.demo.shards import Sizes, render_data

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of photos, zero-shot sets and hostile shards; skips where it is absent."""
    folder = Path(os.environ.get("KDENGINE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "flickr8k-val-000.tar").is_file():
        pytest.skip(f"test data not found in {folder}: set KDENGINE_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small rendered data set: 48 training pairs in one shard."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    render_data(folder, 0, Sizes(num_shards=1, shard_size=48, num_val=20, num_per_class=1))
    return folder


def _rank_main(
    rank: int, fn: Callable[..., Any], world_size: int, store: str, out: str, args: tuple
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        result = ("ok", fn(rank, world_size, *args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, f"{out}.{rank}")
    if result[0] == "error":
        sys.exit(1)
    torch.distributed.destroy_process_group()


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Return ``run(fn, world_size, *args, timeout=120)``: fn's results by rank, over gloo.

    ``fn(rank, world_size, *args)`` must be a module-level function. A rank that raises ends the
    test with that rank's traceback; ranks that outlive ``timeout`` seconds are killed.
    """

    def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list:
        context = torch.multiprocessing.get_context("spawn")
        number = len(list(tmp_path.glob("ranks-*")))
        folder = tmp_path / f"ranks-{number}"
        folder.mkdir()
        store, out = str(folder / "store"), str(folder / "result")
        processes = [
            context.Process(target=_rank_main, args=(r, fn, world_size, store, out, args))
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [r for r, process in enumerate(processes) if process.is_alive()]
        for r in hung:
            processes[r].kill()
        results = [
            torch.load(f"{out}.{r}", weights_only=False) if Path(f"{out}.{r}").exists() else None
            for r in range(world_size)
        ]
        errors = [f"rank {r}:\n{x[1]}" for r, x in enumerate(results) if x and x[0] == "error"]
        if errors:
            pytest.fail("\n".join(errors))
        if hung or any(x is None for x in results):
            pytest.fail(f"ranks {hung} ran into the time-out of {timeout} s")
        return [x[1] for x in results if x is not None]

    return run
