# SPDX-License-Identifier: Apache-2.0
"""The terms of the relational losses from the statistics of their rows, or columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.losses.sweep import Reduced


def hard_term(side: Reduced) -> Tensor:
    """Mean cross-entropy against the labels; infinite if a label names no cell."""
    stats = side.statistics
    loss = -F.logsigmoid(stats.positive - stats.others)
    return side.mean(torch.where(side.has_positive, loss, torch.inf))


def soft_terms(side: Reduced) -> tuple[Tensor, Tensor]:
    """Mean KL(q || p) and mean entropy of q, relative to the positives."""
    stats, has = side.statistics, side.has_positive
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
