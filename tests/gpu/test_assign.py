# SPDX-License-Identifier: Apache-2.0
"""Nearest centroids and range-joins on a GPU: every backend and dtype against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference_assign as reference
from kdengine.ops import assign, range_join

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(rows: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return F.normalize(torch.randn(rows, width, device="cuda", generator=generator), dim=1).to(
        dtype
    )


@pytest.mark.parametrize("tf32", [False, True], ids=["full float32", "tf32 allowed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_float64(
    backend: str, dtype: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tf32:
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    x, key = unit(200, 96, 0, dtype), unit(1500, 96, 1, dtype)
    key[700:900] = key[:200]
    for count in (1, 8, 64):
        found = assign(x, key, count=count, backend=backend)
        index, squares = reference.nearest(x.double(), key.double(), count)
        assert torch.equal(found.keys, index)
        torch.testing.assert_close(found.squared_distance.double(), squares, rtol=1e-6, atol=1e-12)
    for eps in (1e-3, 1.1):
        true = reference.range_join(key.double(), eps=eps)
        assert torch.equal(range_join(key, eps=eps, backend=backend), true)
        across = reference.range_join(x.double(), key.double(), eps=eps)
        assert torch.equal(range_join(x, key, eps=eps, backend=backend), across)


@pytest.mark.parametrize("width", [512, 1280])
def test_backends_agree_on_a_million_keys(width: int) -> None:
    x, key = unit(300, width, 0, torch.bfloat16), unit(1_000_000, width, 1, torch.bfloat16)
    first, second = (assign(x, key, count=4, backend=backend) for backend in BACKENDS)
    assert torch.equal(first.keys, second.keys)
    pairs = [range_join(x, key, eps=1.25, backend=backend) for backend in BACKENDS]
    assert torch.equal(*pairs)
