# SPDX-License-Identifier: Apache-2.0
"""A part of everybody's rows: which they are, where they belong, and how they travel as bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows ``part`` of each of some ranks: those of the first, then those of the next.

    Attributes:
        rank: whose rows they are, or whose they are not.
        others: they are those of all the other ranks.
        world_size: W.
        part: which of each rank's n rows.
        tensors: of as many rows each.
    """

    rank: int
    others: bool
    world_size: int
    part: slice
    tensors: list[Tensor]

    def numbers(self, num_rows: int, device: torch.device) -> Tensor:
        """The rows' numbers among the n W of all ranks."""
        row = torch.arange(self.part.start, self.part.stop, device=device)
        if not self.others:
            return row + self.rank * num_rows
        owner = torch.arange(self.world_size - 1, device=device)
        owner = owner + (owner >= self.rank)
        return (owner[:, None] * num_rows + row).flatten()

    def places(self, numbers: Tensor, num_rows: int) -> Tensor:
        """Where in the block the rows of these numbers are; -1 for one that is not in it."""
        owner, row = numbers.div(num_rows, rounding_mode="floor"), numbers % num_rows
        inside = (row >= self.part.start) & (row < self.part.stop)
        if self.others:
            inside &= (owner >= 0) & (owner < self.world_size) & (owner != self.rank)
            place = owner - (owner > self.rank).long()
        else:
            inside &= owner == self.rank
            place = torch.zeros_like(owner)
        size = self.part.stop - self.part.start
        return torch.where(inside, place * size + row - self.part.start, -1)

    def columns(self, x: Tensor) -> Tensor:
        """What belongs to the block's rows in the last dimension of x, (..., W n)."""
        rows = x.unflatten(-1, (self.world_size, -1))[..., self.part]
        if not self.others:
            return rows[..., self.rank, :]
        return torch.cat([rows[..., : self.rank, :], rows[..., self.rank + 1 :, :]], -2).flatten(-2)

    def rows(self, x: Tensor) -> Tensor:
        """The block's rows of everybody's, (W, n, ...), below each other."""
        part = x[:, self.part]
        if not self.others:
            return part[self.rank]
        return torch.cat([part[: self.rank], part[self.rank + 1 :]]).flatten(0, 1)

    def put_rows(self, x: Tensor, values: Tensor) -> None:
        """Write the other way round."""
        part = x[:, self.part]
        if not self.others:
            part[self.rank] = values
            return
        values = values.unflatten(0, (self.world_size - 1, -1))
        part[: self.rank] = values[: self.rank]
        part[self.rank + 1 :] = values[self.rank :]

    def put_columns(self, x: Tensor, values: Tensor) -> None:
        """Write the other way round."""
        rows = x.unflatten(-1, (self.world_size, -1))[..., self.part]
        if not self.others:
            rows[..., self.rank, :] = values
            return
        values = values.unflatten(-1, (self.world_size - 1, -1))
        rows[..., : self.rank, :] = values[..., : self.rank, :]
        rows[..., self.rank + 1 :, :] = values[..., self.rank :, :]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector: in their dtype, or as bytes where there are several."""
    flat = [x.reshape(-1) for x in tensors]
    if len({x.dtype for x in flat}) > 1:
        flat = [x.view(torch.uint8) for x in flat]
    return torch.cat(flat)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of each of several ranks, (ranks, numbers), below each other."""
    if len(like) == 1:
        return [packed.reshape(-1, *like[0].shape[1:])]
    columns = packed.split([x.nbytes // packed.itemsize for x in like], dim=1)
    # copied: a view of bytes may begin where no number of its dtype can
    return [
        part.clone(memory_format=torch.contiguous_format).view(x.dtype).reshape(-1, *x.shape[1:])
        for part, x in zip(columns, like, strict=True)
    ]
