# SPDX-License-Identifier: Apache-2.0
"""Gradients of the features from strips of gradients of the logits.

For each strip of C rows: the kernels of ``similarity_gradient.py`` write G (C x M), then two
library products give the gradient of the strip's rows, ``scale G right``, and add to that of all
columns, ``scale G.T left``. The scale's gradient is the radial part of the rows' gradient.

Variants: in one phase (G1) the kernel keeps student and teacher tile in registers at once. In two
phases (G2) it first writes the teachers' part of the strip in float32 and then adds the student's,
which allows larger tiles and any number of teachers, for 8 bytes of traffic and, unless the strip
is float32 itself, 4 more bytes of workspace an element. ``tuning.two_phase`` chooses.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kdengine_kernels.common import Matrix, has_tma, num_programs, strip_height
from kdengine_kernels.library import add_product, multiply, new_strip
from kdengine_kernels.similarity_gradient import _gradient_kernel
from kdengine_kernels.similarity_gradient_vectors import _coefficients_kernel, _positives_kernel
from kdengine_kernels.similarity_sweep import positives
from kdengine_kernels.tuning import config

# items of a program
COEFFICIENTS_BLOCK, POSITIVES_BLOCK = 256, 128


class Direction(NamedTuple):
    """What the rows (or the columns) of a matrix pull; vectors (n,), float32.

    Attributes:
        lse: log-sum-exp of each row without its positive.
        weight: factor of its softmax in the gradient.
        coefficient: ``weight exp(shift - lse)``, filled in here.
        positive: gradient at its positive; unused for a teacher.
        logits: logit of its positive, 0 without one.
    """

    lse: Tensor
    weight: Tensor
    coefficient: Tensor
    positive: Tensor
    logits: Tensor


class Pull(NamedTuple):
    """A matrix and what its rows and columns pull; None for a direction that pulls nothing."""

    matrix: Matrix
    rows: Direction | None
    cols: Direction | None


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    query: bool
    key: bool
    scale: bool


class Strip(NamedTuple):
    """Rows first..end and what is common to all strips.

    Attributes:
        unit: (1,) factor of G, or None for 1.
        flag: (1,) int32, not 0 where exponentials must not share a shift.
    """

    first: int
    end: int
    unit: Tensor | None
    flag: Tensor


def gradients(
    student: Pull,
    teachers: Sequence[Pull],
    labels: Tensor,
    col_labels: Tensor,
    wanted: Wanted,
    *,
    two_phase: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's left and right features and of its scale.

    Args:
        student: with at least one direction.
        teachers: what is subtracted from it.
        labels: positives of the rows.
        col_labels: positives of the columns.
        wanted: a gradient that is not wanted is empty.
        two_phase: see the head of this file; in one phase there is at most one teacher.
        budget: bytes for the strip.

    Returns: (B, D) in the features' dtype, (M, D) and 0-D in float32.
    """
    left, right, scale = student.matrix
    num_rows, num_cols = len(left), len(right)
    two_phase = two_phase and len(teachers) > 0
    in_place = left.dtype == torch.float32
    row_bytes = left.itemsize + 4 * (two_phase and not in_place)
    height = strip_height(left, num_cols, row_bytes, budget)
    g, targets = new_strip(left, height, num_cols), None
    if two_phase:
        targets = g if in_place else new_strip(left, height, num_cols, torch.float32)
    flag = torch.zeros(1, dtype=torch.int32, device=left.device)
    _fill_coefficients(student, teachers[0] if teachers else None, flag)
    for teacher in teachers[1:]:
        _fill_coefficients(None, teacher, flag)
    unit = _unit(student, teachers) if left.dtype == torch.float16 else None
    fix = _fixes(student, teachers, labels, col_labels)
    factor = scale.float() if unit is None else scale.float() / unit
    grad_left = torch.empty_like(left if wanted.query else left[:0])
    grad_right = torch.zeros_like(right if wanted.key else right[:0], dtype=torch.float32)
    grad_scale = left.new_zeros((), dtype=torch.float32)
    for first in range(0, num_rows, height):
        strip = Strip(first, min(first + height, num_rows), unit, flag)
        own = g[: strip.end - first]
        if targets is not None:
            for k, teacher in enumerate(teachers):
                kind, before = ("more_targets", targets) if k else ("targets", None)
                _write(kind, None, teacher, before, targets, strip)
            _write("residual_gradient", student, None, targets, own, strip)
        elif teachers:
            _write("dual_gradient", student, teachers[0], None, own, strip)
        else:
            _write("gradient", student, None, None, own, strip)
        fix(own, strip)
        if wanted.query or wanted.scale:
            pulled = multiply(own, right).mul_(factor)
            if wanted.query:
                grad_left[first : strip.end] = pulled
            if wanted.scale:
                grad_scale += (pulled * left[first : strip.end]).sum()
        if wanted.key:
            add_product(grad_right, own.mT, left[first : strip.end])
    # with z = scale * cosine, sum_ij G_ij z_ij = sum_i <x_i, grad x_i>
    grad_scale = grad_scale / scale[0].float() if wanted.scale else grad_scale.new_empty(0)
    return grad_left, grad_right.mul_(factor), grad_scale


def _fill_coefficients(student: Pull | None, teacher: Pull | None, flag: Tensor) -> None:
    """Fill in the coefficients of both directions; raise the flag where a statistic is far off."""
    first, second = student or teacher, teacher or student
    assert first is not None and second is not None
    num_rows, num_cols, block = len(first.matrix.left), len(first.matrix.right), COEFFICIENTS_BLOCK
    _coefficients_kernel[(triton.cdiv(num_rows, block) + triton.cdiv(num_cols, block),)](
        first.matrix.scale,
        second.matrix.scale,
        *_vectors(first.rows, flag),
        *_vectors(first.cols, flag),
        *_vectors(second.rows, flag),
        *_vectors(second.cols, flag),
        flag,
        num_rows,
        num_cols,
        **_flags(student, teacher),
        BLOCK=block,
    )


def _flags(student: Pull | None, teacher: Pull | None) -> dict[str, bool]:
    """Who pulls, as the kernels are told."""
    return {
        "ROWS": student is not None and student.rows is not None,
        "COLS": student is not None and student.cols is not None,
        "SOFT_ROWS": teacher is not None and teacher.rows is not None,
        "SOFT_COLS": teacher is not None and teacher.cols is not None,
    }


def _unit(student: Pull, teachers: Sequence[Pull]) -> Tensor:
    """A factor (1,) that makes the largest gradient of a logit 4096 or so.

    float16 holds nothing below 6e-8, and the gradient of a logit is about a probability over B.
    """
    largest = [
        x.abs().amax()
        for pull in (student, *teachers)
        for side in (pull.rows, pull.cols)
        if side is not None
        for x in (side.weight, side.positive)
    ]
    return (4096 / torch.stack(largest).amax().clamp(min=1e-30)).reshape(1)


def _write(
    kind: str,
    student: Pull | None,
    teacher: Pull | None,
    residual: Tensor | None,
    out: Tensor,
    strip: Strip,
) -> None:
    """Fill a strip with gradients of logits: two launches, of which one returns at once."""
    first, second = student or teacher, teacher or student
    assert first is not None and second is not None
    left, right, _ = first.matrix
    for exact in (False, True):
        blocks = config(kind + "_exact" * exact, left.itemsize)
        num_tiles = triton.cdiv(strip.end - strip.first, blocks.rows) * triton.cdiv(
            len(right), blocks.cols
        )
        grid = (num_programs(num_tiles, left.device, is_rare=exact),)
        _gradient_kernel[grid](
            *first.matrix.operands(blocks),
            *second.matrix.operands(blocks),
            *_vectors(first.rows, strip.flag),
            *_vectors(first.cols, strip.flag),
            *_vectors(second.rows, strip.flag),
            *_vectors(second.cols, strip.flag),
            strip.flag if residual is None else residual,
            out,
            strip.flag if strip.unit is None else strip.unit,
            strip.flag,
            strip.first,
            strip.end,
            len(right),
            num_tiles,
            out.stride(0),
            WIDTH=left.shape[1],
            TEACHER_WIDTH=second.matrix.left.shape[1],
            **_flags(student, teacher),
            RESIDUAL=residual is not None,
            UNIT=student is not None and strip.unit is not None,
            EXACT=exact,
            TMA=has_tma(left.device),
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLS=blocks.cols,
            BLOCK_K=blocks.k,
            GROUP=blocks.group,
            PIECES=blocks.pieces,
            PRECISION=first.matrix.precision,
            TEACHER_PRECISION=second.matrix.precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _at_positives(side: Direction) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return side.logits, side.positive, side.lse, side.weight


def _vectors(side: Direction | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, weight and coefficient; a pointer that is not followed for a direction without pull."""
    return (unused, unused, unused) if side is None else side[:3]


def _fixes(
    student: Pull, teachers: Sequence[Pull], labels: Tensor, col_labels: Tensor
) -> functools.partial[None]:
    """A call that overwrites the positives of a strip: of its rows and of its columns."""
    vectors: list[Tensor] = []
    counts = []
    for of_rows in (True, False):
        mine, other = (student.rows, student.cols)[:: 1 if of_rows else -1]
        found = []
        for matrix, rows, cols in teachers if mine and other else ():
            same, across = (rows, cols)[:: 1 if of_rows else -1]
            if across is not None:
                own = labels if of_rows else col_labels
                logits = same.logits if same else positives(matrix, own, flip=not of_rows)
                found.append((logits, across.lse, across.weight))
        stacked = [x[0] if len(x) == 1 else torch.stack(x) for x in zip(*found, strict=True)]
        vectors += stacked or [labels] * 3
        counts.append(len(found))
    return functools.partial(_fix, student, labels, col_labels, vectors, counts)


def _fix(
    student: Pull,
    labels: Tensor,
    col_labels: Tensor,
    teachers: Sequence[Tensor],
    num_teachers: Sequence[int],
    out: Tensor,
    strip: Strip,
) -> None:
    rows, cols, block = student.rows, student.cols, POSITIVES_BLOCK
    num_blocks = triton.cdiv(strip.end - strip.first, block) if rows else 0
    num_blocks += triton.cdiv(len(col_labels), block) if cols else 0
    vectors: list[Tensor] = []
    for own, side in ((labels, rows), (col_labels, cols)):
        vectors += [own, *([own] * 4 if side is None else _at_positives(side))]
    _positives_kernel[(num_blocks,)](
        out,
        strip.flag if strip.unit is None else strip.unit,
        *vectors,
        *teachers,
        len(labels),
        len(col_labels),
        strip.first,
        strip.end,
        out.stride(0),
        ROWS=rows is not None,
        COLS=cols is not None,
        ROW_TEACHERS=num_teachers[0],
        COL_TEACHERS=num_teachers[1],
        UNIT=strip.unit is not None,
        BLOCK=block,
    )
