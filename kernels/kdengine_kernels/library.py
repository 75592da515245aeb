# SPDX-License-Identifier: Apache-2.0
"""Strips of logits and the library's products with them: torch alone, for Triton and CUDA C++."""

import torch
from torch import Tensor

# rows and columns of most kernels' tiles
TILE = 128
# rows of a strip begin at multiples of so many elements: fast kernels of the library
ALIGNED = 16


def operand(x: Tensor) -> Tensor:
    """Row-major, its rows whole pieces of 16 bytes that begin at multiples of 16 bytes."""
    padding = -x.shape[1] % (16 // x.itemsize)
    x = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    # a view may begin anywhere, and a single row counts as contiguous whatever its stride
    if x.data_ptr() % 16 == 0 and x.stride() == (x.shape[1], 1):
        return x
    return x.new_empty(x.shape).copy_(x)


def strip_height(
    left: Tensor, num_cols: int, itemsize: int, budget: int, num_processors: int
) -> int:
    """Rows of a strip: its product with the keys fills the processors, within the budget.

    A row takes ``itemsize`` bytes a column, and 8 for each of its features. Whole tiles, at least
    one.
    """
    full = TILE * max(1, num_processors // -(-left.shape[1] // 256))
    row_bytes = itemsize * _aligned(num_cols) + 8 * left.shape[1]
    allowed = max(TILE, budget // row_bytes // TILE * TILE)
    return min(full, allowed, -(-len(left) // TILE) * TILE)


def new_strip(like: Tensor, height: int, num_cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (height, num_cols) whose rows begin at multiples of 32 bytes or more.

    So the library multiplies it by its fast kernels for any number of columns.
    """
    return like.new_empty(height, _aligned(num_cols), dtype=dtype)[:, :num_cols]


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, or in float64."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``, float32 or float64."""
    if a.dtype == total.dtype or not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _aligned(num_cols: int) -> int:
    return -(-num_cols // ALIGNED) * ALIGNED
