# SPDX-License-Identifier: Apache-2.0
"""Some cells of a similarity matrix, by number, whoever holds their columns."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdengine import distributed
from kdengine.losses.layout import Layout
from kdengine.ops._backend import refuse_create_graph

# elements of the rows that are looked up at a time
PART = 1 << 22


def picked_cosines(at: Layout, query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """``<query_i, key_j>`` for the m columns j of each row i, by global number.

    Shapes: query (b, D) and columns (b, m) of this rank, key (M, D), all columns or this rank's
    part of them, as ``at.keys`` says; (b, m) float64 if a feature is, else float32.
    Gradients: query; key, where sharded that of the mean over ranks, not to be averaged.
    Memory: (N, m) numbers for the N rows of all ranks, and a bounded part of the rows looked up.
    Communication, sharded: all-gather of the columns and queries, all-to-all of the results;
    backward the same ways back.
    """
    if at.num_ranks == 1 or at.keys == "replicated":
        return _Picked.apply(query, key, columns, 0)
    group = at.exchange.group
    everyone = distributed.gather_rows(query, group)
    numbers = distributed.gather_constant(columns, group, "numbers of columns")
    # nothing averages a shard's gradient over ranks, so it is that of the mean already
    shard = distributed.scale_gradient(key, 1 / at.num_ranks)
    found = _Picked.apply(everyone, shard, numbers, at.first_col)
    # cells of columns that lie elsewhere are 0 here
    return distributed.all_to_all(found.unflatten(0, (at.num_ranks, -1)), group).sum(0)


class _Picked(torch.autograd.Function):
    """0 for the columns before ``first`` and behind the last key."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, columns: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(query, key, columns)
        ctx.first = first
        found = query.new_empty(columns.shape, dtype=_dtype(query, key))
        with torch.autocast(query.device.type, enabled=False):
            for rows, places, here in _parts(query, key, columns, first):
                cosines = torch.einsum("id,ijd->ij", query[rows].to(found), key[places].to(found))
                found[rows] = cosines.masked_fill_(~here, 0)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        refuse_create_graph("picked_cosines")
        query, key, columns = ctx.saved_tensors
        needs_query, needs_key = ctx.needs_input_grad[:2]
        by_query = torch.zeros_like(query) if needs_query else None
        by_key = torch.zeros_like(key, dtype=grad.dtype) if needs_key else None
        for rows, places, here in _parts(query, key, columns, ctx.first):
            own = grad[rows].masked_fill(~here, 0)
            if by_query is not None:
                found = torch.einsum("ij,ijd->id", own, key[places].to(own))
                by_query[rows] = found.to(query.dtype)
            if by_key is not None:
                outer = own[:, :, None] * query[rows, None].to(own)
                by_key.index_put_((places,), outer, accumulate=True)
        return by_query, None if by_key is None else by_key.to(key.dtype), None, None


def _dtype(query: Tensor, key: Tensor) -> torch.dtype:
    is_double = torch.float64 in (query.dtype, key.dtype)
    return torch.float64 if is_double else torch.float32


def _parts(query: Tensor, key: Tensor, columns: Tensor, first: int) -> Any:
    """Slices of rows, the places of their columns among the keys, and which are among them."""
    count = max(1, PART // max(1, columns.shape[1] * query.shape[1]))
    for start in range(0, len(query), count):
        rows = slice(start, start + count)
        places = columns[rows] - first
        here = (places >= 0) & (places < len(key))
        yield rows, places.where(here, 0), here
