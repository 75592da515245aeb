# SPDX-License-Identifier: Apache-2.0
"""Collectives with gradients. ``group=None`` means one process: no collective at all.

Every rank runs the same forward and backward, in the same order. A gradient that leaves a
collective is the derivative of the *sum* of all ranks' losses; data parallel averaging turns it
into that of their mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None


def world_size(group: Group) -> int:
    """The number of ranks; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    """This process's number within the group; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def gather_rows(x: Tensor, group: Group, dtype: torch.dtype | None = None) -> Tensor:
    """The rows of all ranks, in rank order, in ``dtype`` (default: that of x).

    Shapes: x (b, ...), the same on every rank -> (W b, ...).
    Gradients: x, summed over ranks in ``dtype``, then cast to that of x.
    Communication: one all-gather in the dtype of x; backward one reduce-scatter in ``dtype``.
    """
    dtype = dtype or x.dtype
    return x.to(dtype) if world_size(group) == 1 else _GatherRows.apply(x, group, dtype)


def gather_constant(x: Tensor, group: Group) -> Tensor:
    """``gather_rows`` without a gradient, also for integers."""
    if world_size(group) == 1:
        return x.detach()
    gathered = x.new_empty(world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.detach().contiguous(), group=group)
    return gathered


def gather_sizes(sizes: Sequence[int], group: Group, device: torch.device) -> list[list[int]]:
    """Every rank's sizes, by rank.

    Communication: one all-gather of a few numbers, read on the host: a shape that differs between
    ranks must be refused before the collective that it would hang.
    """
    if world_size(group) == 1:
        return [list(sizes)]
    return gather_constant(torch.tensor([list(sizes)], device=device), group).tolist()


def require_even(who: str, name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless all ranks' sizes are the same."""
    if len(set(sizes)) > 1:
        listed = ", ".join(f"rank {r}: {size}" for r, size in enumerate(sizes))
        raise ValueError(
            f"{who}: {name} needs the same number of rows on every rank; {listed} came; drop or "
            "fill up an incomplete batch (drop_last=True)"
        )


def exchange(x: Tensor, group: Group) -> Tensor:
    """Part r of x goes to rank r; part r of the result came from rank r.

    Shapes: x (W, ...), the same on every rank -> (W, ...). Gradients: x, by the way back.
    Communication: one all-to-all, also in the backward.
    """
    return x if world_size(group) == 1 else _Exchange.apply(x, group)


def average(x: Tensor, group: Group) -> Tensor:
    """The mean over ranks; each rank's own x receives the whole gradient (not its 1/W)."""
    return x if world_size(group) == 1 else _Average.apply(x, group)


def average_gradient(x: Tensor, group: Group) -> Tensor:
    """Return x; its gradient is averaged over ranks."""
    return x if world_size(group) == 1 else _AverageGradient.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x; its gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)


def _all_reduce_mean(x: Tensor, group: Group) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total / world_size(group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return gather_constant(x, group).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        own = grad.new_empty(len(grad) // world_size(ctx.group), *grad.shape[1:])
        # an upstream gradient may be an expanded scalar
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own.to(ctx.dtype), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Exchange.apply(grad, ctx.group), None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce_mean(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_reduce_mean(grad, ctx.group), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad * ctx.factor, None
