# SPDX-License-Identifier: Apache-2.0
"""What all kernels share: tile products, powers of e, the order of tiles, launch helpers.

A low precision operand enters a product as it is and is accumulated in float32; float32 operands
are multiplied in full precision unless torch's own settings allow tf32.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kdengine_kernels import library
from kdengine_kernels.tuning import Config

LOG2E = tl.constexpr(1.4426950408889634)
# largest exponent of a sum's terms, in nats
HEADROOM = tl.constexpr(60.0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def tile_product(
    left,
    right,
    first_row,
    first_col,
    num_rows,
    num_cols,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Float32 tile of ``left @ right.T`` from (first_row, first_col) on; anything past the edges.

    Shapes: left (num_rows, WIDTH), right (num_cols, WIDTH), row-major; with TMA their descriptors.
    """
    tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if TMA:
        for start in range(0, WIDTH, BLOCK_K):
            a = left.load([first_row, start])
            b = right.load([first_col, start])
            tile = tl.dot(a, b.T, tile, input_precision=PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        # past the edge the last row stands in
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_rows - 1)
        cols = tl.minimum(first_col + tl.arange(0, BLOCK_COLS), num_cols - 1)
        left_at = left + rows.to(tl.int64)[:, None] * WIDTH + k[None, :]
        right_at = right + cols.to(tl.int64)[None, :] * WIDTH + k[:, None]
        for start in range(0, WIDTH, BLOCK_K):
            if WIDTH % BLOCK_K == 0:
                a = tl.load(left_at + start)
                b = tl.load(right_at + start)
            else:
                here = start + k < WIDTH
                a = tl.load(left_at + start, mask=here[None, :], other=0.0)
                b = tl.load(right_at + start, mask=here[:, None], other=0.0)
            tile = tl.dot(a, b, tile, input_precision=PRECISION)
    return tile


@triton.jit
def fixed_shift(scale):
    """What exponentials are relative to: |logit| <= scale for unit features.

    As near to 0 as overflow allows, because an exponent's rounding error grows with its size.
    """
    return tl.maximum(scale - HEADROOM, 0.0)


@triton.jit
def shifted_exp(x, shift):
    """``exp(x - shift)`` with one rounding of the exponent."""
    return tl.exp2(x * LOG2E - shift * LOG2E)


@triton.jit
def tile_numbers(
    tile,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Row and column of a tile; GROUP rows of tiles share columns within the cache."""
    num_row_tiles, num_col_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_cols, BLOCK_COLS)
    in_group = GROUP * num_col_tiles
    first = tile // in_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


class Matrix(NamedTuple):
    """A similarity matrix ``scale * left @ right.T``, as kernels take it.

    Attributes:
        left: (B, D), contiguous, D a whole number of 16-byte pieces.
        right: (M, D) of the same dtype.
        scale: (1,).
    """

    left: Tensor
    right: Tensor
    scale: Tensor

    @staticmethod
    def of(left: Tensor, right: Tensor, scale: Tensor) -> "Matrix":
        """From features of any layout; two dtypes meet in the one that holds both."""
        dtype = torch.promote_types(left.dtype, right.dtype)
        if INTERPRETED and dtype == torch.bfloat16:
            # the interpreter cannot multiply it
            dtype = torch.float32
        left, right = (library.operand(x.detach().to(dtype)) for x in (left, right))
        return Matrix(left, right, scale.detach().reshape(1))

    @property
    def precision(self) -> str:
        """How float32 is multiplied: with an error of 2^-21, or as torch's settings allow."""
        # also tells what the older settings say, which raise where both kinds are in use
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if allowed or self.left.dtype != torch.float32 else "tf32x3"

    def operands(self, blocks: Config) -> tuple[Any, Any, Tensor]:
        """left, right and scale as arguments of a kernel: descriptors where the GPU has TMA."""
        if not has_tma(self.left.device):
            return self
        return (
            TensorDescriptor.from_tensor(self.left, [blocks.rows, blocks.k]),
            TensorDescriptor.from_tensor(self.right, [blocks.cols, blocks.k]),
            self.scale,
        )


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether the device loads tiles by descriptor (Hopper and later; the interpreter can too)."""
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; those of an H200 in the interpreter."""
    return 132 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(num_tiles: int, device: torch.device, *, is_rare: bool) -> int:
    """Programs of a launch: one a tile, or the few that loop over the tiles of a rare repetition.

    A repetition that is not needed returns at once, but each of its programs still has to start.
    """
    return min(num_tiles, 2 * num_processors(device)) if is_rare else num_tiles


def strip_height(left: Tensor, num_cols: int, itemsize: int, budget: int) -> int:
    """Rows of a strip on the device of ``left``; see ``library.strip_height``."""
    return library.strip_height(left, num_cols, itemsize, budget, num_processors(left.device))
