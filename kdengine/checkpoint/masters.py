# SPDX-License-Identifier: Apache-2.0
"""The fp32 weights behind an engine's parameters, at every ZeRO stage and precision.

Stages 1 to 3 keep fp32 masters in pieces over the ranks; stage 0 in bf16 keeps whole ones in its
optimiser; stage 0 in fp32, and under autocast, trains the parameters themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def student_weights(engine: Any) -> dict[str, Tensor]:
    """The student's open_clip state dict in fp32; see ``whole_weights``."""
    weights = whole_weights(engine, engine.module.student.clip)
    if (scale := engine.module.method.pinned_scale) is not None:
        # the engine may have rounded its parameter to bf16
        weights["logit_scale"] = torch.full_like(weights["logit_scale"], math.log(scale))
    return weights


def whole_weights(engine: Any, module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a part of the engine's module, from fp32 masters, on the CPU of every rank.

    A collective under ZeRO. Buffers (running statistics) are rank 0's on rank 0; they differ
    between ranks.
    """
    weights = {name: value.detach() for name, value in module.state_dict().items()}
    low = _unsharded_masters(engine)
    for name, parameter in module.named_parameters():
        weights[name] = _full(parameter, low.get(parameter))
    return {name: value.to("cpu", copy=True).contiguous() for name, value in weights.items()}


@torch.no_grad()
def clamp_masters(
    engine: Any, parameters: list[nn.Parameter], lowest: float, highest: float
) -> None:
    """Clamp parameters and their fp32 masters in place; no communication, no wait for the device.

    ZeRO rewrites a parameter from its master in every step, so clamping the parameter alone does
    not last. Each rank clamps the piece of the master that it owns.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    low = _unsharded_masters(engine)
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            piece = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, piece.clamp(lowest, highest))
            parameter.ds_tensor.data.clamp_(lowest, highest)  # type: ignore[attr-defined]
        elif getattr(parameter, "_hp_mapping", None) is not None:
            parameter._hp_mapping.get_hp_fragment().clamp_(lowest, highest)  # type: ignore[attr-defined]
        elif parameter in low:
            low[parameter].clamp_(lowest, highest)
        parameter.data.clamp_(lowest, highest)


def _full(parameter: nn.Parameter, master: Tensor | None) -> Tensor:
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if master is not None:
        return master.detach()
    if parameter.requires_grad:
        found = safe_get_full_fp32_param(parameter)
        if found is not None:
            return found.detach().view(getattr(parameter, "ds_shape", parameter.shape))
    with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()


def _unsharded_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Stage 0 in bf16 keeps whole fp32 copies, in the order of its parameter groups."""
    wrapper = engine.optimizer
    if not hasattr(wrapper, "fp32_groups") or not hasattr(wrapper, "fp16_groups"):
        return {}
    return {
        parameter: master
        for parameters, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for parameter, master in zip(parameters, masters, strict=True)
    }
