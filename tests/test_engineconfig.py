# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configuration follows from ours, and a file may add to it but not contradict it."""

import json
from pathlib import Path

import pytest

from kdengine.config import Optim, RunConfig, Train
from kdengine.engineconfig import deepspeed_config


def with_file(tmp_path: Path, content: object, **train: object) -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return RunConfig(train=Train(deepspeed_config=str(path), **train))


def test_batch_counts_all_ranks() -> None:
    built = deepspeed_config(RunConfig(train=Train(batch_size=8)), 4)
    assert built["train_batch_size"] == 32
    assert built["train_micro_batch_size_per_gpu"] == 8
    assert built["gradient_accumulation_steps"] == 1


def test_deepspeed_sees_single_micro_batches() -> None:
    """It would divide gradients by their number."""
    built = deepspeed_config(RunConfig(train=Train(batch_size=8, accum_freq=3)), 4)
    assert built["train_batch_size"] == 32
    assert built["train_micro_batch_size_per_gpu"] == 8
    assert built["gradient_accumulation_steps"] == 1


def test_no_clipping_is_said_explicitly() -> None:
    """DeepSpeed's own default would clip to 1."""
    assert deepspeed_config(RunConfig(), 1)["gradient_clipping"] == 0.0
    assert deepspeed_config(RunConfig(optim=Optim(grad_clip_norm=2.0)), 1)["gradient_clipping"] == 2


@pytest.mark.parametrize(
    ("precision", "bf16", "autocast"),
    [("fp32", False, False), ("bf16", True, False), ("amp_bf16", False, True)],
)
def test_precision(precision, bf16, autocast) -> None:
    built = deepspeed_config(RunConfig(train=Train(precision=precision)), 1)
    assert (built["bf16"]["enabled"], built["torch_autocast"]["enabled"]) == (bf16, autocast)
    # what stands in this list has its gradients averaged in bfloat16
    assert built["torch_autocast"]["lower_precision_safe_modules"] == []


def test_file_is_merged_over_ours(tmp_path: Path) -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    built = deepspeed_config(with_file(tmp_path, given, zero_stage=2), 1)
    assert built["zero_optimization"]["reduce_bucket_size"] == 7
    assert built["zero_optimization"]["stage"] == 2
    assert built["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 5}, r"train_batch_size to 5, this run has 256; .*--train.batch-size"),
        ({"gradient_accumulation_steps": 4}, "accumulation_steps to 4.*--train.accum-freq"),
        ({"zero_optimization": {"stage": 3}}, r"stage to 3, this run has 1.*--train.zero-stage"),
        ({"bf16": {"enabled": True}}, "bf16.enabled to True.*--train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled to True.*--train.precision"),
        ({"gradient_clipping": 1.0}, "--optim.grad-clip-norm"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer .*\[optim\]"),
        ([1], "holds a list"),
        ("{", "not valid JSON"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_contradiction_is_refused(tmp_path: Path, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(with_file(tmp_path, given), 2)


@pytest.mark.parametrize(
    "given", [{"overlap_comm": True}, {"offload_optimizer": {"device": "cpu"}}], ids=str
)
def test_what_would_not_reduce_all_gradients_of_a_step_is_refused(tmp_path: Path, given) -> None:
    content = {"zero_optimization": given}
    (key,) = given
    with pytest.raises(ValueError, match=f"zero_optimization.{key} .*heads and scales"):
        deepspeed_config(with_file(tmp_path, content, accum_freq=2), 2)
    built = deepspeed_config(with_file(tmp_path, content), 2)
    assert built["zero_optimization"][key] == given[key]


def test_compiled_student_is_refused_under_zero_3() -> None:
    with pytest.raises(ValueError, match="torchcompile cannot go with zero_stage 3"):
        Train(torchcompile=True, zero_stage=3)


def test_agreement_and_auto_are_accepted(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 128,
        "gradient_accumulation_steps": 1,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 1},
    }
    built = deepspeed_config(with_file(tmp_path, given), 2)
    assert built["train_batch_size"] == 256
