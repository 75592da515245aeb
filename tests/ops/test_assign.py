# SPDX-License-Identifier: Apache-2.0
"""The ops ``assign`` and ``range_join`` on both backends, against float64, ties and all."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference_assign as reference
from kdengine.ops import assign, assign_torch, range_join
from kdengine.ops.assign import _assign, _join

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
# Triton's interpreter cannot compute in bfloat16
KINDS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    pytest.param("triton", torch.float32, marks=INTERPRETED),
    pytest.param("triton", torch.float16, marks=INTERPRETED),
]
BACKENDS = ["torch", pytest.param("triton", marks=INTERPRETED)]
# rows, keys, width, count
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 3), (63, 257, 16, 1), (65, 130, 37, 5), (130, 65, 8, 20)]
EPS = [1e-6, 0.3, 0.9, 1.5]


def unit(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1).to(dtype)


def with_copies(x: Tensor) -> Tensor:
    """Rows of which every other one stands there again, far from itself."""
    copies = x[::2].flip(0)
    return torch.cat([x, copies])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,dtype", KINDS, ids=str)
def test_nearest_keys_are_those_of_float64_and_the_first_of_copies(
    backend: str, dtype: torch.dtype, shape: tuple
) -> None:
    rows, keys, width, count = shape
    x, key = unit(rows, width, dtype), with_copies(unit(keys, width, dtype))
    index, squares = assign(x, key, count=count, backend=backend)
    true_index, true_squares = reference.nearest(x.double(), key.double(), count)
    assert torch.equal(index, true_index)
    torch.testing.assert_close(squares.double(), true_squares, rtol=1e-6, atol=1e-12)
    assert squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("backend,dtype", KINDS, ids=str)
def test_pairs_are_those_of_float64(
    backend: str, dtype: torch.dtype, shape: tuple, eps: float
) -> None:
    rows, keys, width, _ = shape
    x, y = unit(rows, width, dtype), with_copies(unit(keys, width, dtype))
    y[: min(rows, keys) : 3] = x[: min(rows, keys) : 3]
    true = reference.range_join(x.double(), y.double(), eps=eps)
    assert torch.equal(range_join(x, y, eps=eps, backend=backend), true)
    within = reference.range_join(y.double(), eps=eps)
    assert torch.equal(range_join(y, eps=eps, backend=backend), within)
    assert len(within) >= keys // 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_differences_below_a_product_s_rounding_are_seen(backend: str) -> None:
    """Keys 1e-5 apart at length 1: their products differ by less than float32 resolves."""
    center = unit(1, 64, torch.float32)
    keys = center + 1e-5 * torch.randn(40, 64)
    x = center + 1e-5 * torch.randn(30, 64)
    true = reference.nearest(x.double(), keys.double(), 3)
    assert torch.equal(assign(x, keys, count=3, backend=backend).keys, true[0])
    plain = (x @ keys.T - keys.square().sum(1) / 2).argmax(1)
    assert (plain != true[0][:, 0]).any(), "float32 would do, so this shows nothing"
    distances = reference.squared_distances(x.double(), keys.double()).sqrt()
    eps = float(distances.median())
    pairs = range_join(x, keys, eps=eps, backend=backend)
    assert torch.equal(pairs, (distances < eps).nonzero())
    assert len(pairs) == 599


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_count(backend: str) -> None:
    x, key = 5 * torch.randn(40, 12), torch.randn(50, 12) * torch.logspace(-2, 1, 50)[:, None]
    index = assign(x, key, count=4, backend=backend).keys
    assert torch.equal(index, reference.nearest(x.double(), key.double(), 4)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_alike(backend: str) -> None:
    x, key = unit(9, 5, torch.float32), unit(1, 5, torch.float32).repeat(33, 1)
    index = assign(x, key, count=2, backend=backend).keys
    assert torch.equal(index, torch.tensor([0, 1]).expand(9, 2))
    assert torch.equal(assign(0 * x, 0 * key, backend=backend).keys, torch.zeros(9, 1).long())
    assert len(range_join(key, eps=1e-9, backend=backend)) == 33 * 32 // 2
    assert len(range_join(key, eps=0.0, backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_none(backend: str) -> None:
    none, some = torch.empty(0, 8), unit(3, 8, torch.float32)
    assert assign(none, some, count=2, backend=backend).keys.shape == (0, 2)
    for x, y in ((none, some), (some, none), (none, None)):
        assert range_join(x, y, eps=1.0, backend=backend).shape == (0, 2)


def test_groups_of_columns_lose_nothing() -> None:
    x, key = unit(50, 24, torch.float32), with_copies(unit(1501, 24, torch.float32))
    assert key.shape[0] > 2 * 5 * assign_torch.GROUP
    index = assign(x, key, count=2).keys
    assert torch.equal(index, reference.nearest(x.double(), key.double(), 2)[0])


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, key = unit(100, 6, torch.float32), with_copies(unit(60, 6, torch.float32))
    whole = [*assign(x, key, count=3), range_join(key, eps=0.7), range_join(x, key, eps=0.7)]
    monkeypatch.setattr(assign_torch, "HEIGHT", 7)
    monkeypatch.setattr(assign_torch, "_width", lambda x, dtype: 11)
    parts = [*assign(x, key, count=3), range_join(key, eps=0.7), range_join(x, key, eps=0.7)]
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


@INTERPRETED
def test_parts_of_the_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdengine_kernels import assign as kernels

    x, key = unit(40, 6, torch.float32), with_copies(unit(400, 6, torch.float32))
    monkeypatch.setattr(kernels, "MIN_TILES", 1)
    assert kernels._parts(x, 40, 600, kernels.config("nearest", 4))[0] > 3
    assert torch.equal(assign(x, key, count=3, backend="triton").keys, assign(x, key, count=3)[0])
    for y in (key, None):
        assert torch.equal(range_join(x, y, eps=0.7, backend="triton"), range_join(x, y, eps=0.7))


def test_inputs_need_not_be_contiguous() -> None:
    x, key = unit(6, 20, torch.float32), unit(6, 30, torch.float32)
    plain = assign(x.T.contiguous(), key.T.contiguous())
    assert torch.equal(assign(x.T, key.T).keys, plain.keys)


def test_opcheck() -> None:
    x, key = unit(5, 4, torch.float32), unit(7, 4, torch.float32)
    torch.library.opcheck(_assign, (x, key, 2, "auto"))
    torch.library.opcheck(_join, (x, key, 1.0, "auto"))
    torch.library.opcheck(_join, (x, None, 1.0, "auto"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": torch.randn(3, 5)}, r"assign: expected two sets of rows of one width; \(4, 6\)"),
        ({"count": 0}, "assign: count is between 1 and the number of keys, 3; 0 came"),
        ({"count": 4}, "assign: count is between 1 and the number of keys, 3; 4 came"),
        ({"key": torch.ones(3, 6, dtype=torch.int64)}, "assign: expected floating point rows"),
        ({"x": torch.full((4, 6), torch.nan)}, "assign: expected finite rows"),
        ({"key": torch.full((3, 6), 1e30)}, "assign: expected finite rows below 1e"),
        ({"backend": "faiss"}, "assign: backend is one of"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    given = {"x": torch.randn(4, 6), "key": torch.randn(3, 6)} | arguments
    with pytest.raises(ValueError, match=message):
        assign(given.pop("x"), given.pop("key"), **given)


def test_a_negative_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="range_join: eps is a distance of at least 0; -1"):
        range_join(torch.randn(3, 2), eps=-1)
