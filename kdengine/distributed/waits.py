# SPDX-License-Identifier: Apache-2.0
"""A collective that fails says which one it was and which ranks did not come.

The process group's time-out ends every wait: with gloo the collective raises, with NCCL torch's
watchdog ends the process, or the collective raises with TORCH_NCCL_BLOCKING_WAIT=1.
"""

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist

# the ranks that live notice a failure at about the same time
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1


@contextlib.contextmanager
def waiting(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Run a collective; an error of it gets a message that names it and the ranks that are lost.

    The error keeps its type and its traceback.
    """
    try:
        yield
    except RuntimeError as error:
        error.args = (
            f"{what} over {dist.get_world_size(group)} ranks failed on rank "
            f"{dist.get_rank(group)}: {lost_ranks(group)}; look for the first error among their "
            f"messages, or give the process group a longer time-out ({_first_line(error)})",
        )
        raise


def lost_ranks(group: dist.ProcessGroup) -> str:
    """Which ranks of the group have not failed as well, in words; waits for them a little.

    All ranks that live fail in the collective, and say so in the store; one that is dead, or hangs
    elsewhere, does not.
    """
    members = dist.get_process_group_ranks(group)
    keys = [f"kdengine/failed/{group.group_name}/{number}" for number in range(len(members))]
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[dist.get_rank(group)], "")
        while True:
            silent = [number for number, key in enumerate(keys) if not store.check([key])]
            if not silent or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    except RuntimeError:
        return "the ranks cannot be asked, the process that keeps the store is gone"
    if not silent:
        return "all ranks came and failed"
    listed = ", ".join(str(number) for number in silent[:8]) + (", ..." if len(silent) > 8 else "")
    return f"no word from rank {listed}, dead or hanging"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
