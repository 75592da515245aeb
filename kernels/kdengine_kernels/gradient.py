# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``gradient``: strips of G and of dA, and their products.

The rest of the op is the op ``similarity``; see ``kdengine/ops/gradient.py`` for the mathematics.
One kernel makes the tiles of z and of H (a product of twice the width) and writes both strips,
rounded once. Its exponentials are relative to whole log-sum-exps, so they cannot overflow.

Work: 3 products, and 4 with the features. Memory: two strips of C rows, 2 C M elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdengine_kernels.common import LOG2E, Matrix, has_tma, strip_height, tile_numbers, tile_product
from kdengine_kernels.library import add_product, multiply, new_strip
from kdengine_kernels.tuning import config


@triton.jit
def _pulls_kernel(
    query,
    key,
    scale,
    wide_query,
    wide_key,
    half,
    row_lse,
    row_mean,
    col_lse,
    col_mean,
    diagonal_g,
    diagonal_a,
    g_out,
    a_out,
    first_row,
    end_row,
    num_cols,
    first_positive,
    out_stride,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G = (P + Q) / 2 and dA = (P (H - row_mean) + Q (H - col_mean)) / 2, diagonals as given.

    Row i's is at column first_positive + i.
    """
    row_tile, col_tile = tile_numbers(
        tl.program_id(0), end_row - first_row, num_cols, BLOCK_ROWS, BLOCK_COLS, GROUP
    )
    row0, col0 = first_row + row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
    z = tl.load(scale).to(tl.float32) * tile_product(
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
    h = tl.load(half).to(tl.float32) * tile_product(
        wide_query,
        wide_key,
        row0,
        col0,
        end_row,
        num_cols,
        WIDE,
        BLOCK_ROWS,
        BLOCK_COLS,
        BLOCK_K,
        PRECISION,
        TMA,
    )
    rows = row0 + tl.arange(0, BLOCK_ROWS)
    cols = col0 + tl.arange(0, BLOCK_COLS)
    row_at, col_at = tl.minimum(rows, end_row - 1), tl.minimum(cols, num_cols - 1)
    p = 0.5 * tl.exp2((z - tl.load(row_lse + row_at)[:, None]) * LOG2E)
    q = 0.5 * tl.exp2((z - tl.load(col_lse + col_at)[None, :]) * LOG2E)
    a = p * (h - tl.load(row_mean + row_at)[:, None]) + q * (
        h - tl.load(col_mean + col_at)[None, :]
    )
    same = (first_positive + rows)[:, None] == cols[None, :]
    g = tl.where(same, tl.load(diagonal_g + row_at)[:, None], p + q)
    a = tl.where(same, tl.load(diagonal_a + row_at)[:, None], a)
    here = (rows < end_row)[:, None] & (cols < num_cols)[None, :]
    place = ((rows - first_row).to(tl.int64) * out_stride)[:, None] + cols[None, :]
    tl.store(g_out + place, g.to(g_out.dtype.element_ty), mask=here)
    tl.store(a_out + place, a.to(a_out.dtype.element_ty), mask=here)


def backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    diagonals: Tensor,
    first: int,
    left: Tensor,
    right: Tensor,
    half: float,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of G and dA, float32: G r, dA y, G^T u, dA^T x; see the ``torch`` backend."""
    width = query.shape[1]
    logits = Matrix.of(query, key, scale)
    wide = Matrix.of(
        torch.cat([left, query], 1), torch.cat([key, right], 1), scale.new_full((), half)
    )
    u, r, _ = Matrix.of(left, right, scale)
    x, y, _ = logits
    rows, cols, diagonals = (v.contiguous() for v in (rows, cols, diagonals))
    num_rows, num_cols = len(x), len(y)
    height = strip_height(x, num_cols, 2 * x.itemsize, budget)
    blocks = config("pulls", x.itemsize)
    g, a = (new_strip(x, height, num_cols) for _ in range(2))
    g_r, a_y = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    g_u, a_x = (torch.zeros_like(y, dtype=torch.float32) for _ in range(2))
    for start in range(0, num_rows, height):
        strip = slice(start, min(start + height, num_rows))
        count = strip.stop - start
        num_tiles = triton.cdiv(count, blocks.rows) * triton.cdiv(num_cols, blocks.cols)
        _pulls_kernel[(num_tiles,)](
            *logits.operands(blocks),
            *wide.operands(blocks),
            rows[0],
            rows[1],
            cols[0],
            cols[1],
            diagonals[0],
            diagonals[1],
            g,
            a,
            start,
            strip.stop,
            num_cols,
            first,
            g.stride(0),
            WIDTH=x.shape[1],
            WIDE=wide.left.shape[1],
            TMA=has_tma(x.device),
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLS=blocks.cols,
            BLOCK_K=blocks.k,
            GROUP=blocks.group,
            PRECISION=logits.precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        g_r[strip], a_y[strip] = multiply(g[:count], r), multiply(a[:count], y)
        add_product(g_u, g[:count].mT, u[strip])
        add_product(a_x, a[:count].mT, x[strip])
    # without the columns that fill a width up
    return g_r[:, :width], a_y[:, :width], g_u[:, :width], a_x[:, :width]
