# SPDX-License-Identifier: Apache-2.0
"""The statistics sweep: launches the kernels of ``similarity_statistics.py`` over strips of rows.

Work: one product a matrix. Memory: the partial sums of a strip of C rows, ``4 C`` bytes a sum and
tile of columns and ``4 M`` a sum and tile of rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kdengine_kernels.common import Matrix, has_tma, num_programs
from kdengine_kernels.similarity_statistics import (
    _combine_kernel,
    _positive_kernel,
    _statistics_kernel,
)
from kdengine_kernels.tuning import Config, config


class Side(NamedTuple):
    """Where a sweep leaves what it finds of the rows, or of the columns.

    Attributes:
        labels: number of each item's positive, int32.
        student: (2 + means, n), or None where the sweep leaves the student out.
        teacher: (4, n), or None where it leaves the teacher out.
    """

    labels: Tensor
    student: Tensor | None
    teacher: Tensor | None

    @property
    def num_sums(self) -> int:
        """Partial sums of an item in a tile, with their maximum."""
        return sum(len(x) for x in (self.student, self.teacher) if x is not None)


class Sweep(NamedTuple):
    """What all launches of a sweep share.

    Attributes:
        row_parts: (sums, tiles of columns, C).
        col_parts: (sums, tiles of rows in a strip, M).
        running: (sums, M), of the columns over the strips so far.
        kept: (B, M) each, where the logits of student and teacher go as well, or None.
        flag: (1,) int32, not 0 where sums must be relative to their largest terms.
    """

    student: Matrix
    teacher: Matrix | None
    rows: Side
    cols: Side
    blocks: Config
    row_parts: Tensor
    col_parts: Tensor
    running: Tensor
    kept: tuple[Tensor, Tensor] | None
    flag: Tensor

    def outputs(self, side: Side) -> Iterator[tuple[Tensor, Matrix]]:
        """Where the sums of a side go, in their order, and the matrix that they are of."""
        for out, matrix in ((side.student, self.student), (side.teacher, self.teacher)):
            if out is not None and matrix is not None:
                yield out, matrix


def sweep(
    student: Matrix,
    teacher: Matrix | None,
    rows: Side,
    cols: Side,
    budget: int,
    flag: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill the outputs of both sides; ``budget`` bounds the bytes of the partial sums.

    ``kept`` are float32 strips of B x M, of equal strides, that are filled with the logits.
    With a ``flag`` the sweep is the repetition alone: where the flag is down it changes nothing.
    """
    num_rows, num_cols = len(student.left), len(student.right)
    kind = "statistics" if teacher is None else "dual_statistics"
    kind = kind if kept is None else "keep_" + kind
    blocks = config(kind, student.left.itemsize)
    num_col_tiles = triton.cdiv(num_cols, blocks.cols)
    # bytes of the partial sums that one row adds
    row_bytes = 4 * (rows.num_sums * num_col_tiles + cols.num_sums * num_cols / blocks.rows)
    height = max(1, int(budget / row_bytes / blocks.rows)) * blocks.rows
    height = min(height, triton.cdiv(num_rows, blocks.rows) * blocks.rows)

    def new(*shape: int) -> Tensor:
        return student.left.new_empty(shape, dtype=torch.float32)

    run = Sweep(
        student,
        teacher,
        rows,
        cols,
        blocks,
        new(rows.num_sums, num_col_tiles, height),
        new(cols.num_sums, height // blocks.rows, num_cols),
        new(cols.num_sums, num_cols),
        kept,
        torch.zeros(1, dtype=torch.int32, device=student.left.device) if flag is None else flag,
    )
    for online in (False, True) if flag is None else (True,):
        for first in range(0, num_rows, height):
            end = min(first + height, num_rows)
            num_row_tiles = triton.cdiv(end - first, blocks.rows)
            _reduce_tiles(run, first, end, num_row_tiles * num_col_tiles, online)
            _combine(run, rows, run.row_parts, num_col_tiles, (first, end), online)
            ends = (first == 0, end == num_rows)
            _combine(run, cols, run.col_parts, num_row_tiles, (0, num_cols), online, *ends)
    if flag is not None:
        return
    for side, flip in ((rows, False), (cols, True)):
        for out, matrix in run.outputs(side):
            out[1] = positives(matrix, side.labels, flip=flip)


def positives(matrix: Matrix, labels: Tensor, *, flip: bool) -> Tensor:
    """The logit at each row's (with ``flip`` each column's) positive, 0 without one: (n,)."""
    left, right = (matrix.right, matrix.left) if flip else (matrix.left, matrix.right)
    out = left.new_empty(len(left), dtype=torch.float32)
    block = 32
    _positive_kernel[(triton.cdiv(len(left), block),)](
        left,
        right,
        matrix.scale,
        labels,
        out,
        len(left),
        len(right),
        WIDTH=left.shape[1],
        BLOCK=block,
        BLOCK_K=64,
    )
    return out


def _reduce_tiles(run: Sweep, first: int, end: int, num_tiles: int, online: bool) -> None:
    """Partial sums of the tiles of rows first..end."""
    student, teacher, rows, cols, blocks = run[:5]
    second = teacher or student
    # a repetition finds them written
    logits = None if online else run.kept
    grid = (num_programs(num_tiles, student.left.device, is_rare=online),)
    _statistics_kernel[grid](
        *student.operands(blocks),
        *second.operands(blocks),
        rows.labels,
        cols.labels,
        run.row_parts,
        run.col_parts,
        *((run.flag, run.flag) if logits is None else logits),
        run.flag,
        first,
        end,
        len(student.right),
        num_tiles,
        run.row_parts.stride(1),
        run.row_parts.stride(0),
        run.col_parts.stride(1),
        run.col_parts.stride(0),
        0 if logits is None else logits[0].stride(0),
        WIDTH=student.left.shape[1],
        TEACHER_WIDTH=second.left.shape[1],
        ROWS=rows.student is not None,
        COLS=cols.student is not None,
        SOFT_ROWS=rows.teacher is not None,
        SOFT_COLS=cols.teacher is not None,
        MEANS=any(x is not None and len(x) == 3 for x in (rows.student, cols.student)),
        KEEP=logits is not None,
        ONLINE=online,
        TMA=has_tma(student.left.device),
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLS=blocks.cols,
        BLOCK_K=blocks.k,
        GROUP=blocks.group,
        PRECISION=student.precision,
        TEACHER_PRECISION=second.precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _combine(
    run: Sweep,
    side: Side,
    parts: Tensor,
    num_parts: int,
    items: tuple[int, int],
    online: bool,
    is_first: bool = True,
    is_last: bool = True,
) -> None:
    """Add up the partial sums of some items; with ``is_last`` finish their statistics."""
    first, end = items
    done, block = 0, 64
    for out, matrix in run.outputs(side):
        sums, running = parts[done:], run.running[done:]
        done += len(out)
        _combine_kernel[(triton.cdiv(end - first, block),)](
            sums,
            running,
            out[:, first:],
            matrix.scale,
            run.flag,
            num_parts,
            end - first,
            parts.stride(0),
            parts.stride(1),
            run.running.stride(0),
            out.stride(0),
            NUM_WEIGHTED=len(out) - 2,
            FIRST=is_first,
            LAST=is_last,
            ONLINE=online,
            BLOCK_PARTS=32,
            BLOCK=block,
        )
