# SPDX-License-Identifier: Apache-2.0
"""Every entry of the tuning table, compiled for Hopper without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdengine_kernels.tuning import TABLE

# of a streaming multiprocessor of sm_90, for one program
SHARED_LIMIT = 227 * 1024
# of vectors; their blocks are no matter of tuning
SMALL = {"finalise", "positives", "coefficients", "terms", "terms_backward"}
# of rows and columns, without a product
SMALL |= {"feature", "feature_backward", "moments", "moments_gradient"}


@pytest.fixture(scope="module")
def usages(repository: Path) -> list[dict]:
    """What each kernel uses. In a process of its own: here kernels are made for the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kdengine_kernels.offline", "--json"],
        env=env | {"PYTHONPATH": str(repository / "kernels")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_entry_was_compiled_for_each_dtype(usages: list[dict]) -> None:
    seen = {(usage["kind"].removesuffix(" (repeated)"), usage["dtype"]) for usage in usages}
    assert {kind for kind, _ in seen} >= SMALL
    seen = {(kind, dtype) for kind, dtype in seen if kind not in SMALL}
    dtypes = {2: ("bf16", "fp16"), 4: ("fp32",)}
    expected = {(kind, dtype) for kind, size in TABLE for dtype in dtypes[size]}
    # float16 features are multiplied as float32 there
    assert seen == expected - {("attend", "fp16"), ("pulls", "fp16")}


def test_products_use_warp_group_instructions(usages: list[dict]) -> None:
    without = {usage["kind"].removesuffix(" (repeated)") for usage in usages if not usage["wgmma"]}
    # all that makes no product
    assert without == {"row_gradient", *SMALL}


def test_no_register_is_spilled(usages: list[dict]) -> None:
    assert [usage for usage in usages if usage["stack_bytes"]] == []


def test_shared_memory_suffices(usages: list[dict]) -> None:
    assert [usage for usage in usages if usage["shared_bytes"] > SHARED_LIMIT] == []
