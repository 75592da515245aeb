# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configuration, built from ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdengine.config import RunConfig
from kdengine.ranks import on_gpu

# what our own fields decide: a DeepSpeed file that says otherwise is refused
OWNED = {
    "train_batch_size": "--train.batch-size times the number of ranks",
    "train_micro_batch_size_per_gpu": "--train.batch-size",
    "gradient_accumulation_steps": "--train.accum-freq, for which the training loop itself sees",
    "gradient_clipping": "--optim.grad-clip-norm",
    "zero_optimization.stage": "--train.zero-stage",
    "bf16.enabled": "--train.precision",
    "fp16.enabled": "--train.precision",
    "torch_autocast.enabled": "--train.precision",
    "optimizer": "the [optim] section",
    "scheduler": "the [optim] section",
}


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What our fields say, with the user's file merged over it.

    Values that are ``"auto"`` in the file (Hugging Face's word) count as not given.

    Raises:
        ValueError: the file contradicts a field of ours, or is not a JSON object.
        FileNotFoundError: there is no such file.
    """
    batch, stage = config.train.batch_size, config.train.zero_stage
    accum_freq = config.train.accum_freq
    built: dict[str, Any] = {
        "train_batch_size": batch * world_size,
        "train_micro_batch_size_per_gpu": batch,
        # DeepSpeed divides by this, in one place or another; the sum over micro-batches is exact
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip_norm or 0.0,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "torch_autocast": {
            "enabled": config.train.precision == "amp_bf16",
            "dtype": "bfloat16",
            # of these DeepSpeed would average gradients in bfloat16; plain data parallelism under
            # autocast averages in fp32, and so do we
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": on_gpu() and stage > 0 and not _forgets(stage, accum_freq),
            "contiguous_gradients": True,
            # buckets of DeepSpeed's default size would outweigh a small student
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
    }
    if config.train.deepspeed_config is None:
        return built
    path = Path(config.train.deepspeed_config)
    try:
        given = _without_auto(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed_config: {path} is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"deepspeed_config: {path} holds a {type(given).__name__}, not an object")
    for key, owner in OWNED.items():
        ours, theirs = _at(built, key), _at(given, key)
        if theirs is not None and theirs != (ours or False):
            raise ValueError(
                f"deepspeed_config: {path} sets {key} to {theirs!r}, this run has {ours!r}; it "
                f"follows from {owner}: change that, or take the key out of the file"
            )
    built = _merged(built, given)
    zero = built["zero_optimization"]
    forgetful = {
        "overlap_comm": _forgets(stage, accum_freq) and zero["overlap_comm"],
        "offload_optimizer": accum_freq > 1 and _is_on(zero.get("offload_optimizer")),
    }
    for key, asked in forgetful.items():
        if asked:
            raise ValueError(
                f"deepspeed_config: {path} sets zero_optimization.{key} to {asked!r}, this run has "
                f"accum_freq {accum_freq} at ZeRO stage {stage}: DeepSpeed would then reduce what "
                "the last backward pass of a step touches, and heads and scales have their "
                "gradients in the first; take the key out of the file, or set --train.accum-freq 1"
            )
    return built


def _is_on(offload: Any) -> Any:
    """An offload section that names a device; "none" is DeepSpeed's word for off."""
    return offload if (offload or {}).get("device", "none") != "none" else None


def _forgets(stage: int, accum_freq: int) -> bool:
    """Whether overlapped communication leaves gradients as they are on each rank.

    Stage 1 then reduces what the last backward pass of a step touches, and nothing else.
    """
    return stage == 1 and accum_freq > 1


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k for k in over if isinstance(over[k], Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **over, **{key: _merged(base[key], over[key]) for key in both}}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _without_auto(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key: _without_auto(value) for key, value in values.items() if value != "auto"}
