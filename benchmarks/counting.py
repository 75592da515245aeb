# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank sends and FLOPs of its products, counted where they are asked for."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kdengine.ops import _backend


def _sent(name: str, call: dict[str, Any], ranks: int, rank: int) -> float:
    """Bytes that this rank has to send at least, whatever the algorithm."""
    first, second = call["args"][:2] if len(call["args"]) > 1 else (call["args"][0], None)
    others = ranks - 1
    if (counts := call.get("input_split_sizes")) is not None:
        return second.nbytes / len(second) * (sum(counts) - counts[rank])
    if name in ("all_gather", "all_gather_into_tensor"):
        return others * second.nbytes
    if name in ("reduce_scatter_tensor", "all_to_all_single"):
        return others * second.nbytes / ranks
    if name == "reduce_scatter":
        return others * first.nbytes
    if name == "scatter":
        return others * first.nbytes if call["args"][2] == rank else 0
    assert name == "all_reduce"
    return 2 * others * first.nbytes / ranks


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor")
COLLECTIVES += ("all_to_all_single", "scatter", "all_reduce")


class Counts(TorchDispatchMode):
    """FLOPs of matrix products and, by collective, bytes sent, while ``counting`` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        # inside a custom op it comes whole, and what it is made of is not seen
        assert name != "matmul", "counting: a custom op calls torch.matmul; torch.mm is counted"
        if func.namespace == "aten" and (packet := getattr(torch.ops.aten, name, None)):
            if packet in flop_registry:
                self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what runs inside, forward and backward, on this rank."""
    counts, saved = Counts(), {name: getattr(dist, name) for name in COLLECTIVES}
    running = _backend.running

    def wrapped(name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            ranks, rank = dist.get_world_size(), dist.get_rank()
            counts.bytes[name] += _sent(name, {"args": args, **options}, ranks, rank)
            return original(*args, **options)

        return call

    @contextlib.contextmanager
    def inside(x: Tensor) -> Iterator[None]:
        # a mode does not see into a custom op
        with running(x), counts:
            yield

    for name, original in saved.items():
        setattr(dist, name, wrapped(name, original))
    _backend.running = inside
    try:
        with counts:
            yield counts
    finally:
        _backend.running = running
        for name, original in saved.items():
            setattr(dist, name, original)
