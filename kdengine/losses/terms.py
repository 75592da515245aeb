# SPDX-License-Identifier: Apache-2.0
"""The terms of the relational losses from the statistics of their rows, or columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.losses.sweep import Flags, Reduced
from kdengine.ops import has_terms
from kdengine.ops import terms as terms_op


def all_terms(
    rows: Reduced | None, cols: Reduced | None, hard: Flags, soft: Flags, off: Tensor, backend: str
) -> list[Tensor]:
    """Hard terms, soft terms, and entropies of the teachers, each of rows and of columns.

    What a flag switches off is ``off``.
    """
    sides = [side for side in (rows, cols) if side]
    if sides and has_terms(backend):
        first = [side or sides[0] for side in (rows, cols)]
        values, entropies = terms_op(
            rows and rows.statistics,
            cols and cols.statistics,
            (first[0].labels, first[1].labels),
            (first[0].limit, first[1].limit),
            (first[0].share, first[1].share),
            hard=hard,
            soft=soft,
            backend=backend,
        )
        numbers = iter([*values.unbind(), *entropies.unbind()])
        return [next(numbers) if on else off for on in (*hard, *soft, *soft)]
    by_side = []
    for side, is_hard, is_soft in zip((rows, cols), hard, soft, strict=True):
        found = [off, off, off]
        if side:
            has = side.has_positive()
            found[0] = hard_term(side, has) if is_hard else off
            found[1:] = soft_terms(side, has) if is_soft else (off, off)
        by_side.append(found)
    return [x for pair in zip(*by_side, strict=True) for x in pair]


def hard_term(side: Reduced, has: Tensor) -> Tensor:
    """Mean cross-entropy against the labels; infinite if a label names no cell."""
    stats = side.statistics
    loss = -F.logsigmoid(stats.positive - stats.others)
    return side.mean(torch.where(has, loss, torch.inf))


def soft_terms(side: Reduced, has: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(q || p) and mean entropy of q, relative to the positives."""
    stats = side.statistics
    student = log_sum(stats.others, stats.positive, has)
    teacher = log_sum(stats.teacher_others, stats.teacher_positive, has)
    # the teacher's mass outside the positive: everything where there is none
    outside = torch.where(has, (stats.teacher_others - stats.teacher_positive).sigmoid(), 1)
    shift = stats.teacher_positive - stats.positive
    divergence = student - teacher + outside * (stats.gap - shift)
    entropy = teacher + outside * (stats.teacher_positive - stats.teacher_mean)
    return side.mean(divergence), side.mean(entropy).detach()


def log_sum(others: Tensor, positive: Tensor, has: Tensor) -> Tensor:
    """Log-sum-exp of a whole row, minus its positive (0 where there is none)."""
    return torch.where(has, -F.logsigmoid(positive - others), others)
