# SPDX-License-Identifier: Apache-2.0
"""Ranks that wait for rank 0, outlive it, and tell who keeps them waiting."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdengine import ranks


def said(work, name: str = "work") -> str:
    """What ``first_then_all`` returns, or the error it ends with."""
    try:
        return str(ranks.first_then_all(work, name, dist.group.WORLD))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def work_twice(rank: int, world_size: int, folder: str) -> list[str]:
    """What every rank finds in a file that rank 0 takes time to write, on two calls."""
    found = []
    for number in range(2):
        path = Path(folder, str(number))

        def work(path: Path = path) -> str:
            if rank == 0:
                time.sleep(0.5)
                path.write_text("done")
            return path.read_text() if path.exists() else "too early"

        found.append(said(work))
    return found


def test_every_call_of_a_name_waits_for_its_own_work(run_ranks, tmp_path):
    assert run_ranks(work_twice, 2, str(tmp_path)) == [["done", "done"]] * 2


def fail_then_work(rank: int, world_size: int) -> list[str]:
    """A call that fails on rank 0, and one that does not."""

    def work() -> str:
        raise ValueError(f"boom {rank}")

    return [said(work), said(lambda: "done")]


def test_failure_of_rank_0_reaches_the_others_and_only_that_call(run_ranks):
    first, second = run_ranks(fail_then_work, 2)
    assert first == ["ValueError: boom 0", "done"]
    assert second == ["FirstFailed: work: rank 0 failed: ValueError: boom 0", "done"]


def work_long(rank: int, world_size: int) -> str:
    """Work that takes longer than both limits; signs of life come in between."""
    ranks.BEAT_SECONDS, ranks.LOST_SECONDS = 0.1, 1.5
    ranks._store().set_timeout(timedelta(seconds=1.5))
    dist.barrier()
    return said(lambda: time.sleep(4 * (rank == 0)))


def test_others_wait_as_long_as_rank_0_works(run_ranks):
    assert run_ranks(work_long, 2) == ["None", "None"]


def stay_away(rank: int, world_size: int) -> str:
    """What the others say when rank 0 does not come."""
    dist.barrier()
    ranks._store().set_timeout(timedelta(seconds=1))
    return "" if rank == 0 else said(lambda: "done")


def test_rank_0_that_does_not_come_is_named(run_ranks):
    assert "work: rank 0 did not begin with it" in run_ranks(stay_away, 2)[1]


def lose_first(rank: int, init: str, ending: str, out: str) -> None:
    """Rank 0 ends in the midst of its work; rank 1 writes down what it says to that."""
    ranks.BEAT_SECONDS, ranks.LOST_SECONDS = 0.1, 1.5
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)

    def work() -> None:
        if rank == 0:
            time.sleep(1)
            if ending == "dies":
                os._exit(1)
            raise ValueError("boom")

    Path(f"{out}.{rank}").write_text(said(work))
    os._exit(0)


@pytest.mark.parametrize(
    ("store", "ending", "message"),
    [
        ("file", "dies", "work: rank 0 stopped working on it"),
        ("tcp", "dies", "work: rank 0, which keeps the store, is gone"),
        ("tcp", "raises", "work: rank 0 failed: ValueError: boom"),
    ],
    ids=["killed", "killed-with-store", "failed-and-ended"],
)
def test_rank_0_that_is_lost_is_named(tmp_path, store, ending, message):
    init = f"file://{tmp_path}/store"
    if store == "tcp":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            init = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = torch.multiprocessing.get_context("spawn")
    args = (init, ending, str(tmp_path / "said"))
    processes = [context.Process(target=lose_first, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert message in (tmp_path / "said.1").read_text()


def test_rank_that_never_posted_is_reported_without_waiting(monkeypatch):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(ranks, "_store", lambda: store)
    heartbeat = ranks.Heartbeat(ranks.Ranks(0, 2, 0, torch.device("cpu")))
    try:
        report = heartbeat.report()
    finally:
        heartbeat.close()
    assert report.startswith("those behind first: rank 1: never seen; rank 0: starting after step")
