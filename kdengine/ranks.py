# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run: who am I, agree on something, and who keeps the others waiting.

Every wait here ends with the process group's time-out or with an error that names a rank.
"""

import contextlib
import os
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BEAT_SECONDS = 2.0
POLL_SECONDS = 0.2
# a rank that has posted nothing for so long is dead: only a held GIL keeps the beat from posting
LOST_SECONDS = 120.0
# how long rank 0 stays for the others to read why it fails
FAREWELL_SECONDS = 5.0
PHASES = (
    "starting",
    "evaluating",
    "cutting the student",
    "saving",
    "loading data",
    "computing",
    "updating",
)
T = TypeVar("T")
# the counters of a process without a group
_COUNTS: Counter[str] = Counter()


class FirstFailed(RuntimeError):
    """Rank 0 failed and says why itself."""


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

    def per_node(self) -> int:
        """Ranks of a node, where each has as many and they are numbered node by node; else 0."""
        if self.world_size == 1:
            return 1
        size = local_size()
        if self.world_size % size or self.rank % size != self.local_rank:
            size = 0
        seen = torch.tensor([size, -size], device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MIN)
        least, most = seen.tolist()
        return least if least == -most else 0

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

    def count(self, name: str, more: int) -> int:
        """Add to a counter that all ranks share, which starts at 0; returns what it is then."""
        if dist.is_initialized():
            return _store().add(f"kdengine/count/{name}", more)
        _COUNTS[name] += more
        return _COUNTS[name]

    def first_then_all(self, work: Callable[[], T], name: str) -> T:
        """Run ``work()`` on rank 0 and, when it is done, on the others.

        For work of unknown length that leaves its result on disk, such as validating a data set:
        the others wait as long as rank 0 lives, which a collective could not.

        See ``first_then_all`` of this module.
        """
        return first_then_all(work, name, self.group)

    def first_only(self, work: Callable[[], T], name: str) -> T | None:
        """Run ``work()`` on rank 0 alone while the others wait for it; None on them."""
        return self.first_then_all(lambda: work() if self.first else None, name)


def first_then_all(work: Callable[[], T], name: str, group: dist.ProcessGroup | None) -> T:
    """Run ``work()`` on rank 0 of ``group`` and, when it is done, on the others.

    Every rank of the group calls it, as often as the others and in the same order. The others wait
    as long as rank 0 works, and end when it fails, dies, or does not come within the time-out of
    the process group.

    Args:
        work: what to do; rank 0 leaves a result on disk that makes it quick for the others.
        name: of the work, for messages.
        group: the ranks; None for one process.

    Raises:
        FirstFailed: rank 0 failed; it raises the error itself.
        RuntimeError: rank 0 was lost.
    """
    if group is None or dist.get_world_size(group) == 1:
        return work()
    store, rank = _store(), dist.get_rank(group)
    prefix = f"kdengine/first/{group.group_name}"
    # a number to every call: what an earlier one of this name left behind must not count
    call = f"{prefix}/{store.add(f'{prefix}/calls/{rank}', 1)}"
    if rank == 0:
        return _work_first(work, store, call, dist.get_world_size(group) - 1)
    failure = _await_first(store, call, name)
    if failure:
        raise FirstFailed(f"{name}: rank 0 failed: {failure}")
    return work()


def _work_first(work: Callable[[], T], store: dist.Store, call: str, num_others: int) -> T:
    """Rank 0's part: work, with a sign of life at every beat, then tell how it went."""
    done = threading.Event()

    def beat() -> None:
        number = 0
        while not done.is_set():
            try:
                store.set(f"{call}/beat", str(number))
            except RuntimeError:
                return
            number += 1
            done.wait(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
    try:
        found = work()
        store.set(f"{call}/end", "")
        return found
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            store.set(f"{call}/end", f"{type(error).__name__}: {error}")
            # the store may end with this process: let the others read first
            deadline = time.monotonic() + FAREWELL_SECONDS
            while store.add(f"{call}/told", 0) < num_others and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        raise
    finally:
        done.set()


def _await_first(store: dist.Store, call: str, name: str) -> str:
    """The others' part: what rank 0 failed with, or nothing."""
    last, since = "", time.monotonic()
    try:
        while not store.check([f"{call}/end"]):
            seen = store.get(f"{call}/beat").decode() if store.check([f"{call}/beat"]) else ""
            if seen != last:
                last, since = seen, time.monotonic()
            # torch's stub of the store lacks this attribute
            patience: timedelta = store.timeout  # type: ignore[attr-defined]
            limit = LOST_SECONDS if last else patience.total_seconds()
            if time.monotonic() - since > limit:
                raise RuntimeError(
                    f"{name}: rank 0 "
                    + ("stopped working on it" if last else "did not begin with it")
                    + f": no sign of life for {limit:.0f} s; see what its process said last"
                )
            time.sleep(POLL_SECONDS)
        failure = store.get(f"{call}/end").decode()
        store.add(f"{call}/told", 1)
    except dist.DistError as error:
        raise RuntimeError(
            f"{name}: rank 0, which keeps the store, is gone ({error}); see what its process said "
            "last"
        ) from error
    return failure


def tell(error: Exception) -> None:
    """Print why a run was refused: once, though every rank may have found it out."""
    first = not isinstance(error, FirstFailed)
    if first and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            first = _store().add(f"kdengine/told/{error}", 1) == 1
    if first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # a launcher ends all ranks when the first has ended: that must not be before the line above
        time.sleep(POLL_SECONDS * 5)


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


def join(timeout: timedelta = timedelta(minutes=30)) -> Ranks:
    """This process among those that a launcher started; alone without one."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            return Ranks(0, 1, 0, torch.device("cuda", 0) if on_gpu() else torch.device("cpu"))
        dist.init_process_group("nccl" if on_gpu() else "gloo", timeout=timeout)
    me = current()
    if me.device.type == "cuda":
        torch.cuda.set_device(me.device)
    else:
        share_cores()
    return me


def share_cores() -> None:
    """Give each CPU rank of this machine its share of the cores, unless the user has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))


def local_size() -> int:
    """Ranks of this machine, by the launcher's word; 1 without one."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


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
            return f"after step {self.step}"
        seen, missing = [], []
        for rank in range(self.ranks.world_size):
            key = f"kdengine/beat/{rank}"
            try:
                # asking for a key that was never set would block until the time-out
                if not _store().check([key]):
                    missing.append(f"rank {rank}: never seen")
                    continue
                step, phase, when = _store().get(key).decode().split()
            except RuntimeError:
                return "the other ranks cannot be asked: rank 0, which keeps the store, is gone"
            seen.append((int(step), int(phase), rank, time.time() - float(when)))
        told = missing + [
            f"rank {rank}: {PHASES[phase]} after step {step} (seen {ago:.0f} s ago)"
            for step, phase, rank, ago in sorted(seen)
        ]
        return "those behind first: " + "; ".join(told[:8]) + ("; ..." if len(told) > 8 else "")


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
