# SPDX-License-Identifier: Apache-2.0
"""Other people's losses, each behind a small adapter; one that cannot be imported is left out.

All get the same unit rows. Where a peer knows no scale, the rows are multiplied by it before the
call, so that autograd reaches it; one that has softmaxes of rows only is called twice. Settings
that change the mathematics are off: gradient filters, gradient rescaling.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import OBJECTIVES, TEACHER_SCALE, Inputs, Problem

Adapter = Callable[[Problem, Inputs], Tensor]
LIGER_CHUNKS = (1, 16)


class Peer(NamedTuple):
    """An adapter and what is to know about it.

    Attributes:
        name: the row's ``backend``.
        modules: what it imports.
        objectives: which it can do.
        loss: the adapter.
        units: products it makes, by its source, for each of its objectives.
        learns_scale: the scale gets a gradient.
        has_forward: its gradients are not made in the forward already.
        huge: takes part where only a loss without a matrix can.
    """

    name: str
    modules: tuple[str, ...]
    objectives: tuple[str, ...]
    loss: Adapter
    units: tuple[float, ...]
    learns_scale: bool = True
    has_forward: bool = True
    huge: bool = False


def both_ways(problem: Problem, x: Inputs, rows_only: Callable[..., Tensor]) -> Tensor:
    """Mean over both directions of a loss with softmaxes of rows only."""
    scale = x["scale"]
    there = rows_only(scale * x["image"], x["text"])
    return (there + rows_only(scale * x["text"], x["image"])) / 2


def numbers(x: Tensor) -> Tensor:
    """The positives: each row its own."""
    return torch.arange(len(x), device=x.device)


@functools.cache
def open_clip_losses() -> ModuleType:
    """Its ``loss.py`` alone: it needs torch only, the package much more."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("open_clip is not installed")
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    own = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert own and own.loader
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


def open_clip(wrap: Callable[[Any], Any] = lambda module: module) -> Adapter:
    """ClipLoss and DistillClipLoss, under autocast as with ``--precision amp_bf16``.

    ``wrap`` may compile the two modules.
    """
    found = open_clip_losses()
    contrast, distil = wrap(found.ClipLoss()), wrap(found.DistillClipLoss())

    def loss(problem: Problem, x: Inputs) -> Tensor:
        low = problem.dtype != torch.float32
        device = x["image"].device.type
        student = (x["image"], x["text"], x["scale"])
        with torch.autocast(device, problem.dtype) if low else contextlib.nullcontext():
            if problem.objective == "InfoNCE":
                return contrast(*student)
            teacher = (x["teacher_image"], x["teacher_text"], TEACHER_SCALE)
            contrastive, distilled = distil(*student, *teacher)
        return distilled + (contrastive if problem.objective == "InfoNCE+CRD" else 0.0)

    return loss


def memeff(problem: Problem, x: Inputs) -> Tensor:
    """Its temperature is a number: no gradient of the scale."""
    from memeff import MemoryEfficientCLIPLoss

    options = {"temperature": 1 / problem.scale, "stable": False, "normalized_inputs": True}
    return MemoryEfficientCLIPLoss(**options)(x["image"], x["text"])


def inf_cl(problem: Problem, x: Inputs) -> Tensor:
    """Its single-GPU function; the other one reduces the scale's gradient over ranks."""
    from inf_cl import cal_flash_loss

    head = 256 if problem.width % 256 == 0 else 128

    def rows_only(query: Tensor, key: Tensor) -> Tensor:
        return cal_flash_loss(query, key, numbers(query), head_dim=head).mean()

    return both_ways(problem, x, rows_only)


def cut_cross_entropy(problem: Problem, x: Inputs) -> Tensor:
    """Without the filter of small gradients; with float32 accumulation where it is offered."""
    from cut_cross_entropy import linear_cross_entropy

    is_new = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
    exact = {"impl": "cce_exact"} if is_new else {"filter_eps": None}

    def rows_only(query: Tensor, key: Tensor) -> Tensor:
        return linear_cross_entropy(query, key, numbers(query), **exact)

    return both_ways(problem, x, rows_only)


def apply(function: Any, *tensors: Tensor, **options: Any) -> Any:
    """Call an autograd function by the names of its arguments, defaults included."""
    parameters = list(inspect.signature(function.forward).parameters.values())[1:]
    rest = parameters[len(tensors) :]
    unknown = options.keys() - {p.name for p in rest}
    if unknown:
        raise TypeError(f"{function.__name__} of this version has no {sorted(unknown)}")
    return function.apply(*tensors, *(options.get(p.name, p.default) for p in rest))


def liger(chunks: int) -> Adapter:
    """Fused linear cross-entropy; ``chunks`` times its usual memory for fewer chunks."""

    def loss(problem: Problem, x: Inputs) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as function,
        )

        def rows_only(query: Tensor, key: Tensor) -> Tensor:
            return apply(function, query, key, numbers(query), chunk_mem_const=chunks)[0]

        return both_ways(problem, x, rows_only)

    return loss


def soft_both_ways(x: Inputs, rows_only: Callable[..., Tensor]) -> Tensor:
    """Mean over both directions of KL(teacher || student) along rows."""
    scale, image, text = x["scale"], x["image"], x["text"]
    teacher_image, teacher_text = x["teacher_image"], x["teacher_text"]
    there = rows_only(scale * image, TEACHER_SCALE * teacher_image, text, teacher_text)
    back = rows_only(scale * text, TEACHER_SCALE * teacher_text, image, teacher_image)
    return (there + back) / 2


def with_cross_entropy(problem: Problem, x: Inputs, divergence: Tensor) -> Tensor:
    """The divergence, and Liger's cross-entropy where the objective has one."""
    if not OBJECTIVES[problem.objective].hard:
        return divergence
    return divergence + liger(LIGER_CHUNKS[-1])(problem, x)


def fla(problem: Problem, x: Inputs) -> Tensor:
    """Its fused KL divergence."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return with_cross_entropy(problem, x, soft_both_ways(x, fused_kl_div_loss))


def liger_jsd(problem: Problem, x: Inputs) -> Tensor:
    """Its Jensen-Shannon divergence at beta 0, which is KL(teacher || student)."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as function

    def rows_only(query: Tensor, teacher_query: Tensor, key: Tensor, teacher_key: Tensor) -> Tensor:
        return apply(function, query, key, teacher_query, teacher_key, jsd_beta=0.0)

    return with_cross_entropy(problem, x, soft_both_ways(x, rows_only))


HARD, SOFT = ("InfoNCE",), ("InfoNCE+CRD", "CRD")
CROSS_ENTROPY = "liger_kernel.ops.fused_linear_cross_entropy"
PEERS = [
    Peer("memeff", ("memeff",), HARD, memeff, (5,), learns_scale=False, huge=True),
    Peer("inf-cl", ("inf_cl",), HARD, inf_cl, (10,)),
    Peer("cce exact", ("cut_cross_entropy",), HARD, cut_cross_entropy, (8,)),
    *(
        Peer(f"liger x{n}", (CROSS_ENTROPY,), HARD, liger(n), (6,), has_forward=False)
        for n in LIGER_CHUNKS
    ),
    Peer(
        "fla kl + liger",
        ("fla.modules.fused_kl_div", CROSS_ENTROPY),
        SOFT,
        fla,
        (14, 8),
        has_forward=False,
    ),
    Peer(
        "liger jsd",
        ("liger_kernel.ops.fused_linear_jsd", CROSS_ENTROPY),
        SOFT,
        liger_jsd,
        (14, 8),
        has_forward=False,
    ),
]


def open_clip_peers(with_compile: bool) -> list[Peer]:
    """open_clip's own losses, eager and compiled; none where its file cannot be loaded."""
    try:
        forms = {"open_clip": open_clip()}
        if with_compile:
            compiled = functools.partial(torch.compile, dynamic=False)
            forms["open_clip compiled"] = open_clip(compiled)
    except Exception as error:
        print(f"  left out: open_clip ({error})")
        return []
    return [Peer(name, (), (*HARD, *SOFT), form, (6, 8, 8)) for name, form in forms.items()]


@functools.cache
def importable(modules: tuple[str, ...]) -> str | None:
    """Why one of the modules cannot be imported; None if all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}".splitlines()[0]
    return None
