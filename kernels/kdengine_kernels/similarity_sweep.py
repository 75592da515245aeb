# SPDX-License-Identifier: Apache-2.0
"""The statistics sweep: launches the kernels of ``similarity_statistics.py`` over strips of rows.

Work: one product a matrix. Memory: the partial sums of a strip of C rows, ``4 C`` bytes a sum and
tile of columns and ``4 M`` a sum and tile of rows.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kdengine_kernels.common import Matrix, has_tma, num_programs
from kdengine_kernels.similarity_finalise import _finalise_kernel, _positive_kernel
from kdengine_kernels.similarity_statistics import _statistics_kernel
from kdengine_kernels.tuning import Config, config

# items of a program, partial sums that it reads at once, features at once
FINALISE = {"BLOCK": 64, "BLOCK_PARTS": 32, "BLOCK_K": 64}


class Side(NamedTuple):
    """Where a sweep leaves what it finds of the rows, or of the columns.

    Attributes:
        labels: number of each item's positive, int64.
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

    @property
    def flags(self) -> dict[str, bool | int]:
        """Which statistics are wanted, as the kernels are told."""
        return {
            "ROWS": self.rows.student is not None,
            "COLS": self.cols.student is not None,
            "SOFT_ROWS": self.rows.teacher is not None,
            "SOFT_COLS": self.cols.teacher is not None,
            "MEANS": any(
                x is not None and len(x) == 3 for x in (self.rows.student, self.cols.student)
            ),
        }


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
            finalise(run, first, end, num_row_tiles, online)


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
        **run.flags,
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


def finalise(run: Sweep, first: int, end: int, num_row_tiles: int, online: bool) -> None:
    """Statistics of rows first..end, and after the last of them those of the columns."""
    student, rows, cols = run.student, run.rows, run.cols
    second = run.teacher or student
    num_rows, num_cols, block = end - first, len(student.right), FINALISE["BLOCK"]
    outputs = [
        run.running if out is None else out[:, part]
        for side, part in ((rows, slice(first, end)), (cols, slice(None)))
        for out in (side.student, side.teacher)
    ]
    row_out, teacher_row_out, col_out, teacher_col_out = outputs
    num_blocks = triton.cdiv(num_rows, block) * (rows.num_sums > 0)
    num_blocks += triton.cdiv(num_cols, block) * (cols.num_sums > 0)
    _finalise_kernel[(num_blocks,)](
        run.row_parts,
        run.col_parts,
        run.running,
        row_out,
        col_out,
        teacher_row_out,
        teacher_col_out,
        *student,
        *second,
        rows.labels,
        cols.labels,
        run.flag,
        first,
        num_rows,
        len(student.left),
        num_cols,
        run.row_parts.shape[1],
        num_row_tiles,
        run.row_parts.stride(1),
        run.row_parts.stride(0),
        run.col_parts.stride(1),
        run.col_parts.stride(0),
        row_out.stride(0),
        col_out.stride(0),
        teacher_row_out.stride(0),
        teacher_col_out.stride(0),
        WIDTH=student.left.shape[1],
        TEACHER_WIDTH=second.left.shape[1],
        **run.flags,
        FIRST=first == 0,
        LAST=end == len(student.left),
        ONLINE=online,
        **FINALISE,
    )
