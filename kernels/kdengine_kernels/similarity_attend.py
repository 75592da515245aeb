# SPDX-License-Identifier: Apache-2.0
"""Row softmax against constant keys in one sweep: statistics, and the keys' mean under it.

    others_i = lse_{j != l} z_ij,   attended_i = sum_{j != l} exp(z_ij - others_i) key_j

A softmax over rows alone can be normalised after its product with the keys. For each strip of C
rows (and all columns) a kernel writes the exponentials, relative to the fixed shift of
``similarity_statistics.py``; then come their sums, and a library product with the keys. Both are
divided by the sums of the *rounded* exponentials, so that rounding a row's only large one costs
nothing. Where a row underflows, a flag on the device makes the strip be written again, from exact
log-sum-exps; those launches return at once otherwise.

Work: two products in all, none in the backward. Memory: the strip, ``C M`` elements.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdengine_kernels.common import (
    HEADROOM,
    LOG2E,
    Matrix,
    fixed_shift,
    has_tma,
    num_programs,
    shifted_exp,
    strip_height,
    tile_numbers,
    tile_product,
)
from kdengine_kernels.library import multiply, new_strip
from kdengine_kernels.similarity_statistics import row_others
from kdengine_kernels.similarity_sweep import Side, Sweep, finalise, sweep
from kdengine_kernels.tuning import Config, config


@triton.jit
def _attend_kernel(
    query,
    key,
    scale,
    labels,
    lse,
    out,
    parts,
    flag,
    first_row,
    end_row,
    num_cols,
    num_tiles,
    out_stride,
    part_stride,
    part_slot,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out`` = rounded exponentials without positives; parts[1], [2] = their sums, exact, rounded.

    With EXACT they are relative to ``lse`` and parts are left alone.
    """
    if (tl.load(flag) != 0) != EXACT:
        return
    # a repetition has fewer programs than tiles; in any other launch this is no loop at all
    remaining = num_tiles - tl.program_id(0)
    for turn in (range if EXACT else tl.static_range)(
        tl.cdiv(remaining, tl.num_programs(0)) if EXACT else 1
    ):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        row_tile, col_tile = tile_numbers(
            tile, end_row - first_row, num_cols, BLOCK_ROWS, BLOCK_COLS, GROUP
        )
        row0, col0 = first_row + row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
        s = tl.load(scale).to(tl.float32)
        z = s * tile_product(
            query,
            key,
            row0,
            col0,
            end_row,
            num_cols,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_K,
            PRECISION,
            TMA,
        )
        rows = row0 + tl.arange(0, BLOCK_ROWS)
        cols = col0 + tl.arange(0, BLOCK_COLS)
        row_here = rows < end_row
        col_here = cols < num_cols
        here = row_here[:, None] & col_here[None, :]
        inside = row_others(labels, rows, cols, row_here, col_here)
        if EXACT:
            a = tl.load(lse + rows, mask=row_here, other=0.0)
            e = tl.exp2((z - tl.where(a == float("-inf"), 0.0, a)[:, None]) * LOG2E)
        else:
            e = shifted_exp(z, fixed_shift(s))
        e = tl.where(inside, e, 0.0)
        rounded = e.to(out.dtype.element_ty)
        local = rows - first_row
        place = (local.to(tl.int64) * out_stride)[:, None] + cols[None, :]
        tl.store(out + place, rounded, mask=here)
        if not EXACT:
            at = parts + col_tile.to(tl.int64) * part_stride + local
            tl.store(at + part_slot, tl.sum(e, 1), mask=row_here)
            tl.store(at + 2 * part_slot, tl.sum(rounded.to(tl.float32), 1), mask=row_here)


def attend(matrix: Matrix, labels: Tensor, stats: Tensor, budget: int) -> Tensor:
    """Fill ``stats`` (2, B) with others and positives of the rows; returns attended (B, D).

    Args:
        matrix: with constant keys.
        labels: (B,) int64.
        stats: float32.
        budget: bytes for the strip.
    """
    if matrix.left.dtype == torch.float16:
        # exponentials leave its range
        matrix = Matrix(matrix.left.float(), matrix.right.float(), matrix.scale)
    attended = matrix.left.new_empty(matrix.left.shape, dtype=torch.float32)
    for part, strip, total in exponentials(matrix, labels, stats, budget):
        attended[part] = multiply(strip, matrix.right) / total[:, None]
    return attended


def exponentials(
    matrix: Matrix, labels: Tensor, stats: Tensor, budget: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Strip by strip: its rows, their exponentials without positives, and the sum of each row.

    A row's exponentials are relative to a number of its own. Their sum is of what was written, but
    1 where there is none. ``stats`` (2, B) is filled with others and positives on the way.
    """
    left, right, scale = matrix
    num_rows, num_cols = len(left), len(right)
    blocks = config("attend", left.itemsize)
    num_col_tiles = triton.cdiv(num_cols, blocks.cols)
    # a tenth is enough for five partial sums a row and tile of columns
    height = strip_height(left, num_cols, left.itemsize, budget * 9 // 10)
    strip = new_strip(left, height, num_cols)
    parts = left.new_empty(3, num_col_tiles, height, dtype=torch.float32)
    found = left.new_empty(3, num_rows, dtype=torch.float32)
    rows, nothing = Side(labels, found, None), Side(labels, None, None)
    num_strips = triton.cdiv(num_rows, height)
    flags = torch.zeros(num_strips, dtype=torch.int32, device=left.device)
    shift = (scale.float() - HEADROOM.value).clamp(min=0)
    for i, first in enumerate(range(0, num_rows, height)):
        end, flag = min(first + height, num_rows), flags[i : i + 1]
        part = slice(first, end)
        write = functools.partial(
            _write, matrix, labels, found[0], strip, parts, flag, first, end, blocks
        )
        write(exact=False)
        # found[2] = sum of rounded exponentials over that of exact ones
        ends = Sweep(matrix, None, rows, nothing, blocks, parts, parts, parts, None, flag)
        finalise(ends, first, end, 0, online=False)
        own = Matrix(left[part], right, scale)
        sweep(own, None, Side(labels[part], found[:2, part], None), nothing, budget, flag)
        write(exact=True)
        stats[:, part] = found[:2, part]
        # the sum of what was written: 1 for the exact strip, 0 where there is nothing
        total = found[2, part] * torch.exp(found[0, part] - shift)
        yield part, strip[: end - first], torch.where((flag != 0) | (total == 0), 1.0, total)


def _write(
    matrix: Matrix,
    labels: Tensor,
    lse: Tensor,
    strip: Tensor,
    parts: Tensor,
    flag: Tensor,
    first: int,
    end: int,
    blocks: Config,
    *,
    exact: bool,
) -> None:
    num_cols = len(matrix.right)
    num_tiles = triton.cdiv(end - first, blocks.rows) * triton.cdiv(num_cols, blocks.cols)
    _attend_kernel[(num_programs(num_tiles, strip.device, is_rare=exact),)](
        *matrix.operands(blocks),
        labels,
        lse,
        strip,
        parts,
        flag,
        first,
        end,
        num_cols,
        num_tiles,
        strip.stride(0),
        parts.stride(1),
        parts.stride(0),
        WIDTH=matrix.left.shape[1],
        EXACT=exact,
        TMA=has_tma(strip.device),
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLS=blocks.cols,
        BLOCK_K=blocks.k,
        GROUP=blocks.group,
        PRECISION=matrix.precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
