# SPDX-License-Identifier: Apache-2.0
"""Kernels that write the gradient of a strip of logits.

With the statistics of the forward and what the loss wants of them (``weight``), the gradient of
logit z_ij is

    weight_i exp(z_ij - others_i)  -  sum_k teacher_weight_i exp(t_ij - teacher_others_i)

for the rows, plus the same for the columns; at a positive of its row, what the loss wants of that
positive stands in place of the row's part, and likewise for its column. ``_gradient_kernel``
subtracts in float32 and rounds once, to the features' dtype. It knows nothing of positives, which
would cost it a third of its registers: ``similarity_gradient_vectors.py`` overwrites those cells.

As in the statistics sweep the exponentials share a fixed shift, one for each element and matrix;
where a statistic lies too far from it (a flag on the device), a second launch takes one for each
direction instead. The launch that is not needed returns at once.
"""

import triton
import triton.language as tl

from kdengine_kernels.common import (
    LOG2E,
    fixed_shift,
    shifted_exp,
    tile_numbers,
    tile_product,
)


@triton.jit
def _pull(x, items, lse, weight, AXIS: tl.constexpr):
    """``weight exp(x - lse)`` of a tile, by rows (AXIS 1) or columns (AXIS 0)."""
    a = tl.load(lse + items)
    w = tl.where(a == float("-inf"), 0.0, tl.load(weight + items))
    a = tl.where(a == float("-inf"), 0.0, a)
    return tl.exp2((x - tl.expand_dims(a, AXIS)) * LOG2E) * tl.expand_dims(w, AXIS)


@triton.jit
def _pulls(
    x, scale, rows, cols, vectors, ROWS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr
):
    """What one matrix's rows and columns pull, of a tile of its logits.

    ``vectors`` are lse, weight and coefficient of the rows, and of the columns.
    """
    row_lse, row_weight, row_coefficient, col_lse, col_weight, col_coefficient = vectors
    if EXACT:
        if ROWS and COLS:
            return _pull(x, rows, row_lse, row_weight, 1) + _pull(x, cols, col_lse, col_weight, 0)
        elif ROWS:
            return _pull(x, rows, row_lse, row_weight, 1)
        else:
            return _pull(x, cols, col_lse, col_weight, 0)
    else:
        e = shifted_exp(x, fixed_shift(scale))
        if ROWS and COLS:
            a, b = tl.load(row_coefficient + rows), tl.load(col_coefficient + cols)
            return e * (a[:, None] + b[None, :])
        elif ROWS:
            return e * tl.load(row_coefficient + rows)[:, None]
        else:
            return e * tl.load(col_coefficient + cols)[None, :]


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    pair = x.reshape(x.shape[0], 2, x.shape[1] // 2)
    return pair.permute(0, 2, 1).split()


@triton.jit
def _write(
    student,
    teacher,
    residual,
    out,
    unit,
    corner,
    area,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write a tile's gradients, PIECES of its columns one after the other.

    What is loaded beside an accumulator takes registers: less of it at a time lets the tile grow.
    ``student`` and ``teacher`` are logits, scale and vectors, ``corner`` the tile's first row and
    column, ``area`` the strip's first and last row, the columns, and the stride of ``out``.
    """
    z, s, vectors = student
    t, r, teacher_vectors = teacher
    row0, col0 = corner
    if PIECES > 1:
        half: tl.constexpr = z.shape[1] // 2
        z0, z1 = _halves(z)
        t0, t1 = z0, z1
        if SOFT_ROWS or SOFT_COLS:
            t0, t1 = _halves(t)
        _write(
            (z0, s, vectors),
            (t0, r, teacher_vectors),
            residual,
            out,
            unit,
            (row0, col0),
            area,
            ROWS,
            COLS,
            SOFT_ROWS,
            SOFT_COLS,
            RESIDUAL,
            UNIT,
            EXACT,
            PIECES // 2,
        )
        _write(
            (z1, s, vectors),
            (t1, r, teacher_vectors),
            residual,
            out,
            unit,
            (row0, col0 + half),
            area,
            ROWS,
            COLS,
            SOFT_ROWS,
            SOFT_COLS,
            RESIDUAL,
            UNIT,
            EXACT,
            PIECES // 2,
        )
    else:
        first_row, end_row, num_cols, out_stride = area
        rows = row0 + tl.arange(0, z.shape[0])
        cols = col0 + tl.arange(0, z.shape[1])
        row_at, col_at = tl.minimum(rows, end_row - 1), tl.minimum(cols, num_cols - 1)
        g = tl.zeros(z.shape, tl.float32)
        if ROWS or COLS:
            g += _pulls(z, s, row_at, col_at, vectors, ROWS, COLS, EXACT)
        if SOFT_ROWS or SOFT_COLS:
            g -= _pulls(t, r, row_at, col_at, teacher_vectors, SOFT_ROWS, SOFT_COLS, EXACT)
        here = (rows < end_row)[:, None] & (cols < num_cols)[None, :]
        place = ((rows - first_row).to(tl.int64) * out_stride)[:, None] + cols[None, :]
        if RESIDUAL:
            g += tl.load(residual + place, mask=here, other=0.0)
        if UNIT:
            g *= tl.load(unit)
        tl.store(out + place, g.to(out.dtype.element_ty), mask=here)


@triton.jit
def _gradient_kernel(
    query,
    key,
    scale,
    teacher_query,
    teacher_key,
    teacher_scale,
    row_lse,
    row_weight,
    row_coefficient,
    col_lse,
    col_weight,
    col_coefficient,
    teacher_row_lse,
    teacher_row_weight,
    teacher_row_coefficient,
    teacher_col_lse,
    teacher_col_weight,
    teacher_col_coefficient,
    residual,
    out,
    unit,
    flag,
    first_row,
    end_row,
    num_cols,
    num_tiles,
    out_stride,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFT_ROWS: tl.constexpr,
    SOFT_COLS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """``out`` (end_row - first_row, num_cols) = [residual +] student's pulls - teacher's pulls."""
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
        if SOFT_ROWS or SOFT_COLS:
            r = tl.load(teacher_scale).to(tl.float32)
            t = r * tile_product(
                teacher_query,
                teacher_key,
                row0,
                col0,
                end_row,
                num_cols,
                TEACHER_WIDTH,
                BLOCK_ROWS,
                BLOCK_COLS,
                BLOCK_K,
                TEACHER_PRECISION,
                TMA,
            )
        if ROWS or COLS:
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
        # stand in for a matrix that is not there
        if not (ROWS or COLS):
            z, s = t, r
        if not (SOFT_ROWS or SOFT_COLS):
            t, r = z, s
        vectors = (row_lse, row_weight, row_coefficient, col_lse, col_weight, col_coefficient)
        teacher_vectors = (
            teacher_row_lse,
            teacher_row_weight,
            teacher_row_coefficient,
            teacher_col_lse,
            teacher_col_weight,
            teacher_col_coefficient,
        )
        _write(
            (z, s, vectors),
            (t, r, teacher_vectors),
            residual,
            out,
            unit,
            (row0, col0),
            (first_row, end_row, num_cols, out_stride),
            ROWS,
            COLS,
            SOFT_ROWS,
            SOFT_COLS,
            RESIDUAL,
            UNIT,
            EXACT,
            PIECES,
        )
