# SPDX-License-Identifier: Apache-2.0
"""The ops ``assign`` and ``range_join``: near rows, without a matrix of distances.

    assign       the l keys with the least ||x_i - key_k||, nearest first
    range_join   all pairs with ||x_i - y_j|| < eps, or i < j within x

A backend makes products in float32, which leave ``||x - key||^2 = |x|^2 + |key|^2 - 2 <x, key>``
with an error of at most a bound; what that cannot decide is decided by differences in float64. So
the answers are those of float64, and every backend, tiling and number of ranks gives the same ones;
of keys at equal distance the first comes first.

Memory: tiles within the workspace, and results. Work: N K D, and a little in float64: rows whose
neighbours are within the bound (about D 1e-7 of the squares) of each other are looked at again with
a few spare candidates, and with all keys where those are as near.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdengine.ops import _backend

# candidates beyond those asked for: near ties among as many are told apart without all keys
SPARE = 3
# elements of a block of differences
BLOCK = 1 << 18
# of values, so that no product overflows
LIMIT = 1e15
# a float32 product below may have vanished
TINY = 2.0**-126


class Assignment(NamedTuple):
    """The nearest keys of every row.

    Attributes:
        keys: numbers of keys, (N, count) int64, nearest first.
        squared_distance: (N, count), float64 if an input is, else float32.
    """

    keys: Tensor
    squared_distance: Tensor


def assign(x: Tensor, key: Tensor, *, count: int = 1, backend: str = "auto") -> Assignment:
    """The ``count`` nearest keys of every row, of equally near ones the first.

    Of unit rows and keys the nearest is that of the greatest cosine.

    Shapes: x (N, D), key (K, D), 1 <= count <= K < 2^31.
    Gradients: none; inputs are constants.
    Raises: ValueError for shapes and counts that do not fit and rows that are not finite;
    RuntimeError for a backend that cannot run.
    Source: see ``kdengine.reference_assign.nearest``.
    """
    _check("assign", x, key, backend)
    if not 1 <= count <= len(key):
        raise ValueError(
            f"assign: count is between 1 and the number of keys, {len(key)}; {count} came"
        )
    return Assignment(*_assign(x.detach(), key.detach(), count, backend))


def range_join(x: Tensor, y: Tensor | None = None, *, eps: float, backend: str = "auto") -> Tensor:
    """All pairs of a row of x and a row of y that are closer than ``eps``.

    Shapes: x (N, D), y (M, D); without y pairs i < j within x.
    Returns: (E, 2) int64, (i, j) in ascending order. Gradients: none.
    Memory: 20 bytes a pair beside the workspace; give x in blocks where there may be many.
    Raises: ValueError for shapes that do not fit, rows that are not finite or a negative eps;
    RuntimeError for a backend that cannot run.
    Source: see ``kdengine.reference_assign.range_join``.
    """
    _check("range_join", x, x if y is None else y, backend)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"range_join: eps is a distance of at least 0; {eps} came")
    return _join(x.detach(), None if y is None else y.detach(), float(eps), backend)


def _check(who: str, x: Tensor, key: Tensor, backend: str) -> None:
    _backend.check_name(who, backend)
    if x.ndim != 2 or key.ndim != 2 or x.shape[1] != key.shape[1] or not x.shape[1]:
        raise ValueError(
            f"{who}: expected two sets of rows of one width; {tuple(x.shape)} and "
            f"{tuple(key.shape)} came"
        )
    for rows in (x, key):
        if not rows.is_floating_point():
            raise ValueError(f"{who}: expected floating point rows; {rows.dtype} came")


def _check_values(who: str, *sets: Tensor) -> None:
    """Raise ValueError where products of float32 might overflow; waits for the device."""
    for rows in sets:
        if rows.numel() and not bool(rows.abs().max() < LIMIT):
            raise ValueError(
                f"{who}: expected finite rows below {LIMIT:.0e}, and a value of "
                f"{float(rows.abs().max())} came"
            )


@torch.library.custom_op("kdengine::assign", mutates_args=())
def _assign(x: Tensor, key: Tensor, count: int, backend: str) -> tuple[Tensor, Tensor]:
    module = _backend.choose("assign", [x, key], backend)
    _check_values("assign", x, key)
    with _backend.running(x):
        squares = _squares(key)
        kept = min(len(key), count + SPARE)
        half = (squares / 2).to(_backend.statistics_dtype(x, key))
        values, index = module.nearest(x, key, half, kept)
        # of scores <x, key> - |key|^2 / 2, each row's own
        norms = _squares(x).sqrt()[:, None]
        bound = _error(x, key) * (norms * _largest(squares).sqrt() + _largest(squares))
        bound += x.shape[1] * TINY
        is_clear = (-values[:, : count + 1].double().diff(dim=1) > 2 * bound).all(1)
        found = index[:, :count].clone()
        distances = _distances(x, key, found)
        unclear = (~is_clear).nonzero()[:, 0]
        if len(unclear):
            values, index, bound = (t[unclear] for t in (values, index, bound))
            again = _settle(x[unclear], key, values, index, bound, count)
            found[unclear], distances[unclear] = again
    return found, distances.square_().to(_backend.statistics_dtype(x, key))


@_assign.register_fake
def _assign_fake(x: Tensor, key: Tensor, count: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], count)
    dtype = _backend.statistics_dtype(x, key)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=dtype)


def _settle(
    x: Tensor, key: Tensor, values: Tensor, index: Tensor, bound: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Order candidates by float64 distances; where others may be as near, all keys."""
    index = index.sort(1).values
    distances, order = _distances(x, key, index).sort(dim=1, stable=True)
    found, distances = index.gather(1, order)[:, :count], distances[:, :count]
    if index.shape[1] == len(key):
        return found, distances
    # no key but the candidates scores above the last of them
    score = (_squares(x) - distances[:, -1].square()) / 2
    open_rows = (score <= values[:, -1].double() + bound[:, 0]).nonzero()[:, 0]
    for part in open_rows.split(max(1, BLOCK // len(key))):
        every, order = _distances(x[part], key, None).sort(dim=1, stable=True)
        found[part], distances[part] = order[:, :count], every[:, :count]
    return found, distances


@torch.library.custom_op("kdengine::range_join", mutates_args=())
def _join(x: Tensor, y: Tensor | None, eps: float, backend: str) -> Tensor:
    other = x if y is None else y
    module = _backend.choose("assign", [x, other], backend)
    _check_values("range_join", x, other)
    dtype = _backend.statistics_dtype(x, other)
    with _backend.running(x):
        squares = _squares(x), _squares(other)
        bound = 2 * _error(x, other) * float(sum(map(_largest, squares))) + x.shape[1] * TINY
        # the root of the sum of squares has an error of its own
        limit = eps**2 * (1 + 1e-12) + bound
        sums = (part.to(dtype) for part in squares)
        first, second, found = module.pairs(x, other, *sums, limit, y is None)
        certain = found.double() < eps**2 * (1 - 1e-12) - bound
        unsure = (~certain).nonzero()[:, 0]
        for part in unsure.split(max(1, BLOCK // x.shape[1])):
            distance = _pair_distances(x[first[part]], other[second[part]])
            certain[part] = distance < eps
        return torch.stack([first[certain], second[certain]], 1)


@_join.register_fake
def _join_fake(x: Tensor, y: Tensor | None, eps: float, backend: str) -> Tensor:
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)


def _error(x: Tensor, key: Tensor) -> float:
    """Of a product of rows by a backend, relative to the product of their lengths."""
    dtype = torch.promote_types(x.dtype, key.dtype)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    tf32 = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if dtype == torch.float32 and tf32:
        unit = 2.0**-10 / x.shape[1]
    return unit * (x.shape[1] + 16)


def _largest(squares: Tensor) -> Tensor:
    return squares.max() if len(squares) else squares.new_zeros(())


def _squares(x: Tensor) -> Tensor:
    """Squared lengths of rows, float64."""
    parts = x.split(max(1, BLOCK // x.shape[1]))
    return torch.cat([part.double().square().sum(1) for part in parts])


def _distances(x: Tensor, key: Tensor, index: Tensor | None) -> Tensor:
    """Distances to some keys of each row, or to all: float64, and one arithmetic for every pair."""
    count = len(key) if index is None else index.shape[1]
    found = x.new_empty(len(x), count, dtype=torch.float64)
    width = x.shape[1]
    if index is None:
        for part in torch.arange(count, device=x.device).split(max(1, BLOCK // width)):
            found[:, part] = _by_differences(x.double(), key[part].double())
        return found
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK // (width * count))):
        near = key[index[rows]].double()
        found[rows] = _by_differences(x[rows, None].double(), near)[:, 0]
    return found


def _pair_distances(x: Tensor, y: Tensor) -> Tensor:
    return _by_differences(x[:, None].double(), y[:, None].double())[:, 0, 0]


def _by_differences(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
