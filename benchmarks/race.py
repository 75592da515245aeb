# SPDX-License-Identifier: Apache-2.0
"""Compare contenders with the truth, then time those that are right.

A contender that raises, or that is wrong, gets a row with the reason and no time. Ours must be
accurate; a peer may lose digits (its errors are in its row) up to a gradient error of 1e-1.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Journal, Spread

# relative errors of the loss and of the gradients from which on ours is wrong
LIMITS = {torch.float32: (1e-4, 1e-3)}
LIMITS |= dict.fromkeys((torch.bfloat16, torch.float16), (1e-3, 2e-2))
PEER_LIMIT = 1e-1
# exit codes: all was run but something is wrong; the GPU needs a new process
WRONG, DEVICE_LOST = 3, 70
# a CUDA graph is tried up to here: above, launches take no time
GRAPH_ROWS = 8192


class Contender(NamedTuple):
    """One implementation, bound to its inputs.

    Attributes:
        name: the row's ``backend``.
        loss: makes the loss.
        learned: what gets a gradient, by name.
        ours: one of the engine's backends.
        units: products it makes forward and backward.
        has_forward: its forward alone means something (not where gradients are made in it).
        same_value: its value is the oracle's (soft cross-entropies differ by a constant).
        using: what its step runs in.
    """

    name: str
    loss: Callable[[], Tensor]
    learned: dict[str, Tensor]
    ours: bool = False
    units: float | None = None
    has_forward: bool = True
    same_value: bool = True
    using: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def step(self) -> tuple[Tensor, ...]:
        """Loss and gradients."""
        with self.using():
            loss = self.loss()
            return (loss, *torch.autograd.grad(loss, list(self.learned.values())))

    def forward(self) -> Tensor:
        """The loss alone, without a graph."""
        with torch.no_grad():
            return self.loss()


class Truth(NamedTuple):
    """Loss and gradients in float64, and how they were made."""

    loss: Tensor
    gradients: dict[str, Tensor]
    source: str


class Timed(NamedTuple):
    """What was measured of a contender."""

    errors: dict[str, float]
    forward: Spread | None
    both: Spread
    peak_mib: float


def errors_of(contender: Contender, truth: Truth) -> dict[str, float]:
    """Relative errors of the loss and of each gradient."""
    loss, *gradients = contender.step()
    true = truth.loss.item()
    errors = {"loss": abs(loss.item() - true) / abs(true)} if contender.same_value else {}
    for name, found in zip(contender.learned, gradients, strict=True):
        y = truth.gradients[name]
        size = y.norm().item()
        if not y.ndim:
            # that of a scale may pass through 0; a tenth of the loss stands for its size
            size += 1e-1 * abs(true) / contender.learned[name].item()
        errors[name] = (found.double() - y).norm().item() / size
    return errors


def why_wrong(errors: dict[str, float], ours: bool, dtype: torch.dtype) -> str | None:
    """The first error above its limit, in words; None if all are below."""
    loss_limit, gradient_limit = LIMITS[dtype] if ours else (float("inf"), PEER_LIMIT)
    for name, error in errors.items():
        limit = loss_limit if name == "loss" else gradient_limit
        # not a number is wrong, too
        if not error <= limit:
            return f"wrong: {name} {error:.0e}, allowed {limit:.0e}"
    return None


def check(
    contender: Contender, truth: Truth, dtype: torch.dtype
) -> tuple[dict[str, float], str | None]:
    """Errors, and why the contender may not be timed."""
    try:
        errors = errors_of(contender, truth)
    except Exception as error:
        return {}, in_one_line(error)
    return errors, why_wrong(errors, contender.ours, dtype)


def in_one_line(error: Exception) -> str:
    """Type and first line of a message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def race(
    identity: dict[str, Any],
    contenders: list[Contender],
    truth: Truth,
    journal: Journal,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    where: dict[str, Any],
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Check all, time those that are right; what was measured, and the reasons of the others.

    The caller writes the rows of what was measured; the others are in the journal already.
    ``where`` describes the machine.
    """
    right: dict[str, Contender] = {}
    errors: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for contender in contenders:
        own = {**identity, "backend": contender.name}
        if journal.has(own):
            continue
        journal.start(own)
        found, reason = check(contender, truth, dtype)
        told = " ".join(f"{name} {x:.0e}" for name, x in found.items())
        print(f"  {contender.name}: {told} {reason or ''}", flush=True)
        if reason is None:
            right[contender.name], errors[contender.name] = contender, found
            continue
        reasons[contender.name] = reason
        journal.add(own, errors=found, reason=reason, **where)
        if common.is_device_lost():
            sys.exit(DEVICE_LOST)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not right:
        return {}, reasons
    journal.start({**identity, "backend": "timing"})
    forward = common.time_interleaved(
        {k: x.forward for k, x in right.items() if x.has_forward}, device, seconds / 2
    )
    both = common.time_interleaved({k: x.step for k, x in right.items()}, device, seconds)
    peak = {k: common.peak_bytes(x.step, device) / common.MIB for k, x in right.items()}
    return {k: Timed(errors[k], forward.get(k), both[k], peak[k]) for k in right}, reasons


def time_graph(contender: Contender, device: torch.device, seconds: float) -> Spread:
    """Time of a replayed CUDA graph of forward and backward: the work without the launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contender.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.step()
    return common.time_interleaved({"graph": graph.replay}, device, seconds)["graph"]
