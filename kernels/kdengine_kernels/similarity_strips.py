# SPDX-License-Identifier: Apache-2.0
"""Gradients of the features from strips of gradients of the logits.

For each strip of C rows: the kernels of ``similarity_gradient.py`` write G (C x M), then two
library products give the gradient of the strip's rows, ``scale G right``, and add to that of all
columns, ``scale G.T left``. The scale's gradient is the radial part of the rows' gradient.

Variants: in one phase the kernel keeps student and teacher tile in registers at once. In two
phases it first writes the teachers' part of the strip in float32 and then adds the student's,
which allows larger tiles and any number of teachers, for 8 bytes of traffic an element.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kdengine_kernels.common import (
    Matrix,
    add_product,
    has_tma,
    multiply,
    new_strip,
    num_programs,
    strip_height,
)
from kdengine_kernels.similarity_gradient import (
    _coefficients_kernel,
    _gradient_kernel,
    _positives_kernel,
)
from kdengine_kernels.similarity_sweep import positives
from kdengine_kernels.tuning import config


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
    height = strip_height(left, num_cols, left.itemsize + 4 * two_phase, budget)
    g = new_strip(left, height, num_cols)
    targets = new_strip(left, height, num_cols, torch.float32) if two_phase else None
    flag = torch.zeros(1, dtype=torch.int32, device=left.device)
    for pull in (student, *teachers):
        _fill_coefficients(pull, flag)
    unit = _unit(student, teachers) if left.dtype == torch.float16 else None
    fixes = _fixes(student, teachers, labels, col_labels)
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
        for fix in fixes:
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


def _fill_coefficients(pull: Pull, flag: Tensor) -> None:
    """Fill in the coefficients of both directions; raise the flag where a statistic is far off."""
    block = 256
    for side in (pull.rows, pull.cols):
        if side is not None:
            num_items = len(side.lse)
            _coefficients_kernel[(triton.cdiv(num_items, block),)](
                side.lse,
                side.weight,
                pull.matrix.scale,
                side.coefficient,
                flag,
                num_items,
                BLOCK=block,
            )


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
            ROWS=student is not None and student.rows is not None,
            COLS=student is not None and student.cols is not None,
            SOFT_ROWS=teacher is not None and teacher.rows is not None,
            SOFT_COLS=teacher is not None and teacher.cols is not None,
            RESIDUAL=residual is not None,
            UNIT=student is not None and strip.unit is not None,
            EXACT=exact,
            TMA=has_tma(left.device),
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLS=blocks.cols,
            BLOCK_K=blocks.k,
            GROUP=blocks.group,
            PRECISION=first.matrix.precision,
            TEACHER_PRECISION=second.matrix.precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _vectors(side: Direction | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, weight and coefficient; a pointer that is not followed for a direction without pull."""
    return (unused, unused, unused) if side is None else side[:3]


def _fixes(
    student: Pull, teachers: Sequence[Pull], labels: Tensor, col_labels: Tensor
) -> list[functools.partial[None]]:
    """Calls that overwrite the positives of a strip: of its rows, then of its columns."""
    fixes = []
    for of_rows in (True, False):
        mine, other = (student.rows, student.cols)[:: 1 if of_rows else -1]
        own, others = (labels, col_labels)[:: 1 if of_rows else -1]
        if mine is None:
            continue
        logits, lses, weights = [], [], []
        for matrix, rows, cols in teachers:
            same, across = (rows, cols)[:: 1 if of_rows else -1]
            if across is not None and other is not None:
                if same is None:
                    logits.append(positives(matrix, own, flip=not of_rows))
                else:
                    logits.append(same.logits)
                lses.append(across.lse)
                weights.append(across.weight)
        stacked = [torch.stack(x) if x else mine.lse for x in (logits, lses, weights)]
        fix = functools.partial(_fix, of_rows, mine, other, own, others, stacked, len(logits))
        fixes.append(fix)
    return fixes


def _fix(
    of_rows: bool,
    mine: Direction,
    other: Direction | None,
    labels: Tensor,
    other_labels: Tensor,
    teachers: Sequence[Tensor],
    num_teachers: int,
    out: Tensor,
    strip: Strip,
) -> None:
    block = 128
    # all columns may have a positive in the strip, but only its own rows
    first, end = (strip.first, strip.end) if of_rows else (0, len(labels))
    across = other or mine
    _positives_kernel[(triton.cdiv(end - first, block),)](
        out,
        strip.flag if strip.unit is None else strip.unit,
        labels,
        mine.logits,
        mine.positive,
        other_labels,
        across.positive,
        across.lse,
        across.weight,
        *teachers,
        first,
        len(labels),
        len(other_labels),
        strip.first,
        strip.end,
        out.stride(0),
        OF_ROWS=of_rows,
        OTHER=other is not None,
        NUM_TEACHERS=num_teachers,
        UNIT=strip.unit is not None,
        BLOCK=block,
    )
