# SPDX-License-Identifier: Apache-2.0
"""Gradients on their way to the owners of their rows, who add them up.

A reduce-scatter in low precision rounds its running sum at every hop: in bfloat16 an error of 1e-2
over 64 ranks. Here pieces travel, and are added up in float32 where they arrive: two roundings,
whatever the number of ranks, for as many bytes. Between nodes that would be every rank's pieces for
every other; so ranks of a node add up first, each for the owners of its own number within a node:

    one node   piece of r for q        from r to q, which adds up W
    several    pieces of r for all q   from r to the rank of its node with q's number there, which
               of one number           adds up and rounds; then one sum a node to each q

Bytes that a rank sends: (W - 1) pieces either way; between nodes, 1 / per_node of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Nodes(NamedTuple):
    """Ranks node by node; one node where their size is not known, or does not divide W."""

    rank: int
    num_nodes: int
    per_node: int

    @classmethod
    def of(cls, rank: int, world_size: int, per_node: int) -> "Nodes":
        """From the ranks of a node, 0 if unknown; nodes of one rank are as good as one node."""
        is_known = per_node > 1 and world_size % per_node == 0
        size = per_node if is_known else world_size
        return cls(rank, world_size // size, size)

    def mates(self, count: int) -> list[int]:
        """By rank, ``count`` for those of this node, this rank too."""
        return [count * (r // self.per_node == self.rank // self.per_node) for r in self._all()]

    def peers(self, count: int) -> list[int]:
        """By rank, ``count`` for those of this number in their node, this rank too."""
        return [count * (r % self.per_node == self.rank % self.per_node) for r in self._all()]

    def _all(self) -> range:
        return range(self.num_nodes * self.per_node)


class Homeward:
    """The sum of what all other ranks say about this rank's rows.

    Args:
        nodes: where the ranks are.
        begin: starts a collective; the call that waits for it.
        gradient: ((W - 1) size, D), rows of the other ranks in their order.
        size: rows of a rank.
    """

    def __init__(
        self, nodes: Nodes, begin: Callable[..., Callable[[], None]], gradient: Tensor, size: int
    ) -> None:
        self.nodes, self.begin, self.dtype = nodes, begin, gradient.dtype
        width = gradient.shape[1]
        if nodes.num_nodes == 1:
            counts = nodes.mates(size)
            # what this rank itself has to say about its rows does not travel
            counts[nodes.rank] = 0
            sent = gradient.contiguous()
        else:
            counts = nodes.mates(size * nodes.num_nodes)
            before, after = gradient.tensor_split([nodes.rank * size])
            every = torch.cat([before, gradient.new_zeros(size, width), after])
            # by number within a node, then by node
            by_node = every.view(nodes.num_nodes, nodes.per_node, size, width)
            sent = by_node.transpose(0, 1).reshape(-1, width)
        self.shape = (-1, nodes.num_nodes, size, width)
        self.received, self.arrived = self._start(sent, counts)
        self.is_last_leg = nodes.num_nodes == 1

    def _start(self, sent: Tensor, counts: list[int]) -> tuple[Tensor, Callable[[], None]]:
        received = torch.empty_like(sent)
        splits = {"output_split_sizes": counts, "input_split_sizes": counts}
        return received, self.begin(dist.all_to_all_single, received, sent, **splits)

    def _sum(self) -> Tensor:
        """Of the pieces that arrived, by node and row."""
        self.arrived()
        exact = torch.promote_types(self.dtype, torch.float32)
        return self.received.view(self.shape).sum(0, dtype=exact)

    def advance(self) -> None:
        """Let the sums of this node go on to the others; to be called while something runs."""
        if self.is_last_leg:
            return
        sums = self._sum().to(self.dtype)
        _, size, width = sums.shape
        counts = self.nodes.peers(size)
        self.shape = (-1, 1, size, width)
        self.received, self.arrived = self._start(sums.view(-1, width), counts)
        self.is_last_leg = True

    def arrive(self) -> Tensor:
        """Wait for the rest; (size, D) in float64 or float32."""
        self.advance()
        return self._sum()[0]
