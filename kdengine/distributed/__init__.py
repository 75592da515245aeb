# SPDX-License-Identifier: Apache-2.0
"""What travels between ranks: collectives with gradients, features in chunks, waits that end."""

from kdengine.distributed.blocks import Block
from kdengine.distributed.collectives import (
    Group,
    all_to_all,
    average,
    average_gradient,
    gather_constant,
    gather_numbers,
    gather_rows,
    rank,
    require_even,
    require_same,
    scale_gradient,
    world_size,
)
from kdengine.distributed.stream import AHEAD, Exchange, default_chunks

__all__ = [
    "AHEAD",
    "Block",
    "Exchange",
    "Group",
    "all_to_all",
    "average",
    "average_gradient",
    "default_chunks",
    "gather_constant",
    "gather_numbers",
    "gather_rows",
    "rank",
    "require_even",
    "require_same",
    "scale_gradient",
    "world_size",
]
