# SPDX-License-Identifier: Apache-2.0
"""The ``triton`` backend of ``similarity``: one statistics sweep, then gradients in strips.

The forward makes every tile once and keeps O(B + M) numbers (``similarity_statistics.py``). The
backward makes the tiles again, a strip of rows at a time; a kernel writes the gradient of the
strip's logits (``similarity_gradient.py``) and the library multiplies the strip into the gradients
of both features, in float32.

Products of B x M x width: one a matrix in the forward; in the backward one a matrix and one for
each feature that needs a gradient. Workspace: partial sums, then the strip; never B x M.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdengine_kernels.common import Matrix, strip_height
from kdengine_kernels.similarity_attend import attend as attend_rows
from kdengine_kernels.similarity_strips import Direction, Pull, Wanted, gradients
from kdengine_kernels.similarity_sweep import Side, sweep
from kdengine_kernels.tuning import LEAST_ROWS, two_phase


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    on_rows: bool,
    on_cols: bool,
    soft_rows: bool,
    soft_cols: bool,
    means: bool,
    attend: bool,
    keep: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of rows, columns and teachers; see ``kdengine.ops.similarity``."""
    student, teachers = _matrices(query, key, scale, teacher_query, teacher_key, teacher_scale)
    num_rows, num_cols = len(query), len(key)

    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    row_stats = new(2 + means, num_rows if on_rows else 0)
    col_stats = new(2 + means, num_cols if on_cols else 0)
    teacher_rows = new(len(teachers) if soft_rows else 0, 4, num_rows if soft_rows else 0)
    teacher_cols = new(len(teachers) if soft_cols else 0, 4, num_cols if soft_cols else 0)
    row_labels, col_labels = labels.contiguous(), col_labels.contiguous()
    if attend:
        attended = attend_rows(student, row_labels, row_stats, budget)
        attended = attended[:, : key.shape[1]].contiguous()
        return row_stats, col_stats, teacher_rows, teacher_cols, attended, new(0, 0, 0)
    # the student's own statistics come with the first sweep
    for k, teacher in enumerate(teachers if teachers and (soft_rows or soft_cols) else [None]):
        row_side = Side(
            row_labels,
            row_stats if on_rows and k == 0 else None,
            teacher_rows[k] if soft_rows else None,
        )
        col_side = Side(
            col_labels,
            col_stats if on_cols and k == 0 else None,
            teacher_cols[k] if soft_cols else None,
        )
        sweep(student, teacher, row_side, col_side, budget)
    return row_stats, col_stats, teacher_rows, teacher_cols, new(0, key.shape[1]), new(0, 0, 0)


def backward(
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    statistics: Sequence[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; one that is not needed is empty."""
    matrices = _matrices(query, key, scale, teacher_query, teacher_key, teacher_scale)
    student, teachers = matrices
    rows, cols = (
        _direction(x[0], g[0], g[1], x[1]) if x.shape[1] else None
        for x, g in zip(statistics[:2], grads[:2], strict=True)
    )
    pulls = []
    for k, teacher in enumerate(teachers):
        soft_rows, soft_cols = (
            _direction(x[k, 0], g[k, 2], None, x[k, 1]) if len(x) else None
            for x, g in zip(statistics[2:], grads[2:], strict=True)
        )
        if soft_rows or soft_cols:
            pulls.append(Pull(teacher, soft_rows, soft_cols))
    rows_needed = min(LEAST_ROWS, len(query))
    room = strip_height(student.left, len(key), student.left.itemsize + 4, budget)
    widths = [pull.matrix.left.shape[1] for pull in pulls]
    left, right, grad_scale = gradients(
        Pull(student, rows, cols),
        pulls,
        labels.contiguous(),
        col_labels.contiguous(),
        Wanted(need_query, need_key, need_scale),
        two_phase=two_phase(query.shape[1], widths, student.left.itemsize, room >= rows_needed),
        budget=budget,
    )
    # without the columns that fill a width up
    return (
        left[:, : query.shape[1]].to(query.dtype).contiguous()
        if need_query
        else query.new_empty(0),
        right[:, : key.shape[1]].to(key.dtype).contiguous() if need_key else key.new_empty(0),
        grad_scale.to(scale.dtype),
    )


def _direction(lse: Tensor, weight: Tensor, positive: Tensor | None, logits: Tensor) -> Direction:
    weight = weight.float().contiguous()
    positive = weight if positive is None else positive.float().contiguous()
    return Direction(lse, weight, torch.empty_like(lse), positive, logits)


def _matrices(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
) -> tuple[Matrix, list[Matrix]]:
    """The student's similarity matrix and those of the teachers."""
    teachers = zip(teacher_query, teacher_key, teacher_scale, strict=True)
    return Matrix.of(query, key, scale), [Matrix.of(u, v, r) for u, v, r in teachers]
