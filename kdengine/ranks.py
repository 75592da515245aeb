# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run: who am I, agree on something, and who keeps the others waiting.

Every wait here ends with the process group's time-out or with an error that names a rank.
"""

import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BEAT_SECONDS = 2.0
PHASES = ("starting", "evaluating", "saving", "loading data", "computing", "updating")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group for losses that span ranks; None for one process."""
        return dist.group.WORLD if self.world_size > 1 else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, an object that pickles, on every rank."""
        if self.world_size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on at least one rank; a collective."""
        if self.world_size == 1:
            return flag
        seen = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks, in place; one all-reduce."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def first_then_all(self, work: Callable[[], T], name: str) -> T:
        """Run ``work()`` on rank 0 and, when it is done, on the others.

        For work of unknown length that leaves its result on disk, such as validating a data set:
        the others wait without a time-out, which a collective could not.

        Raises:
            RuntimeError: it failed on rank 0 (which raises the error itself).
        """
        if self.world_size == 1:
            return work()
        store, key = _store(), f"kdengine/{name}"
        if self.first:
            try:
                found = work()
            except BaseException as error:
                store.set(key, f"{type(error).__name__}: {error}")
                raise
            store.set(key, "")
            return found
        while not store.check([key]):
            time.sleep(0.2)
        failure = store.get(key).decode()
        if failure:
            raise RuntimeError(f"rank 0 failed: {failure}")
        return work()


def environment() -> None:
    """Fill in what a launcher would have set, for a process started plainly."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def on_gpu() -> bool:
    """Whether to train on GPUs: where there are some, unless DS_ACCELERATOR=cpu forbids it."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def current() -> Ranks:
    """This process's place, from the process group and the launcher's environment."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu() else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def share_cores() -> None:
    """Give each CPU rank of this machine its share of the cores, unless the user has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local)))


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that torch held on the device; on CPU, most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Heartbeat:
    """Posts where this rank is to the common store, so that a failed wait can name who is behind.

    Attributes:
        step: the number of completed steps.
        phase: what the rank is doing in this step, as a position in ``PHASES``.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.step = self.phase = 0
        self._closed = threading.Event()
        if ranks.world_size > 1:
            self._post()
            threading.Thread(target=self._beat, daemon=True).start()

    def at(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does now; costs nothing."""
        self.phase = PHASES.index(phase)
        self.step = self.step if step is None else step

    def close(self) -> None:
        """Stop posting."""
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                self._post()
            except RuntimeError:
                return

    def _post(self) -> None:
        place = f"{self.step} {self.phase} {time.time()}"
        _store().set(f"kdengine/beat/{self.ranks.rank}", place)

    def report(self) -> str:
        """One line that says where each rank was last seen, those behind first."""
        if self.ranks.world_size == 1:
            return f"rank 0 of 1, after step {self.step}"
        seen = []
        for rank in range(self.ranks.world_size):
            try:
                step, phase, when = _store().get(f"kdengine/beat/{rank}").decode().split()
            except RuntimeError:
                return "the other ranks cannot be asked: rank 0, which keeps the store, is gone"
            seen.append((int(step), int(phase), rank, time.time() - float(when)))
        told = [
            f"rank {rank}: {PHASES[phase]} after step {step} (seen {ago:.0f} s ago)"
            for step, phase, rank, ago in sorted(seen)
        ]
        return "those behind first: " + "; ".join(told[:8]) + ("; ..." if len(told) > 8 else "")


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
