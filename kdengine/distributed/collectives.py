# SPDX-License-Identifier: Apache-2.0
"""Collectives with gradients. ``group=None`` means one process: no collective at all.

Every rank runs the same forward and backward, in the same order. A gradient that leaves a
collective is the derivative of the *sum* of all ranks' losses; data parallel averaging turns it
into that of their mean.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdengine.distributed.waits import waiting

Group = dist.ProcessGroup | None


def world_size(group: Group) -> int:
    """The number of ranks; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    """This process's number within the group; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """The rows of all ranks, in rank order.

    Shapes: x (b, ...), the same on every rank -> (W b, ...).
    Gradients: x, summed over ranks in its dtype.
    Communication: one all-gather; backward one reduce-scatter.
    """
    return x if world_size(group) == 1 else _GatherRows.apply(x, group)


def gather_constant(x: Tensor, group: Group, what: str = "") -> Tensor:
    """``gather_rows`` without a gradient, also for integers; ``what`` is for the error message."""
    if group is None or world_size(group) == 1:
        return x.detach()
    gathered = x.new_empty(world_size(group) * len(x), *x.shape[1:])
    with waiting(f"all-gather of {what or tuple(x.shape)}", group):
        dist.all_gather_into_tensor(gathered, x.detach().contiguous(), group=group)
    return gathered


def gather_numbers(
    numbers: Mapping[str, int], group: Group, device: torch.device
) -> dict[str, list[int]]:
    """By name, every rank's number.

    A size that differs between ranks must be refused by all of them before the collective that it
    would hang, so all ranks tell each other in every call: one that remembered an earlier agreement
    could not know that another's size has changed. The host reads the numbers, but does not wait
    for the GPU: they travel on a stream of their own, behind nothing that the device has to do but
    earlier collectives of the group.

    Communication: one all-gather of a few numbers.
    """
    if group is None or world_size(group) == 1:
        return {name: [number] for name, number in numbers.items()}
    with _own_stream(device):
        mine = torch.tensor([list(numbers.values())], device=device)
        all_numbers = gather_constant(mine, group, "sizes").tolist()
    return dict(zip(numbers, map(list, zip(*all_numbers, strict=True)), strict=True))


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def require_even(who: str, name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless all ranks' numbers of rows are the same."""
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{who}: {name} needs the same number of rows on every rank; {by_rank(sizes)} came; "
            "drop or fill up an incomplete batch (drop_last=True)"
        )


def require_same(who: str, name: str, numbers: Sequence[int]) -> None:
    """Raise ValueError unless all ranks' numbers are the same."""
    if len(set(numbers)) > 1:
        raise ValueError(
            f"{who}: {name} needs to be the same on every rank; {by_rank(numbers)} came; call it "
            "with the same arguments on every rank"
        )


def by_rank(numbers: Sequence[int]) -> str:
    """What each rank has, in words."""
    return ", ".join(f"rank {r}: {number}" for r, number in enumerate(numbers))


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Part r of x goes to rank r; part r of the result came from rank r.

    Shapes: x (W, ...), the same on every rank -> (W, ...). Gradients: x, by the way back.
    Communication: one all-to-all, also in the backward.
    """
    return x if world_size(group) == 1 else _AllToAll.apply(x, group)


def average(x: Tensor, group: Group) -> Tensor:
    """The mean over ranks; each rank's own x receives the whole gradient (not its 1/W)."""
    return x if world_size(group) == 1 else _Average.apply(x, group)


def average_gradient(x: Tensor, group: Group) -> Tensor:
    """Return x; its gradient is averaged over ranks."""
    return x if world_size(group) == 1 else _AverageGradient.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x; its gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)


def _all_reduce_mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with waiting(f"all-reduce of {tuple(x.shape)}", group):
        dist.all_reduce(total, group=group)
    return total / world_size(group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_constant(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        own = grad.new_empty(len(grad) // world_size(ctx.group), *grad.shape[1:])
        # an upstream gradient may be an expanded scalar
        with waiting(f"reduce-scatter of {tuple(grad.shape)}", ctx.group):
            dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        with waiting(f"all-to-all of {tuple(x.shape)}", group):
            dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _AllToAll.apply(grad, ctx.group), None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce_mean(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
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
