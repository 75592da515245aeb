# SPDX-License-Identifier: Apache-2.0
"""What a loss of a row wants of the row's statistics: derivatives in closed form.

hard * softplus(others - target) + soft * KL(q || p),   target = scale cos(theta + margin)
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Wanted(NamedTuple):
    """What a loss is for each row, and what it wants of the row's statistics; vectors (n,).

    Attributes:
        loss: in nats.
        others: gradient of the student's log-sum-exp without its positive.
        positive: gradient of the positive's logit.
        teacher: minus the gradient of the student's mean under the teacher, without the positive.
        scale: gradient of scale where all logits stay what they are.
    """

    loss: Tensor
    others: Tensor
    positive: Tensor
    teacher: Tensor
    scale: Tensor


def want(
    student: Tensor,
    teacher: Tensor,
    inside: Tensor,
    scale: Tensor,
    hard: float,
    soft: float,
    margin: float,
) -> Wanted:
    """A row's loss and its derivatives.

    Args:
        student: (2, n), others and positive of ``kdengine.ops.similarity``.
        teacher: (4, n), others, positive, gap and mean; anything where ``soft`` is 0.
        inside: (n,), whether a row has a positive.
        scale: 0-D.
        hard: weight of the cross-entropy.
        soft: weight of the divergence.
        margin: an angle.
    """
    others, positive = student
    total = Wanted(*torch.zeros(5, *others.shape, dtype=others.dtype, device=others.device))
    if hard:
        target, slope = with_margin(positive, scale, margin)
        miss = torch.where(inside, hard * (others - target).sigmoid(), 0)
        total = Wanted(
            torch.where(inside, -hard * F.logsigmoid(target - others), math.inf * hard),
            miss,
            -miss * slope,
            total.teacher,
            -miss * (target - slope * positive) / scale,
        )
    if soft:
        teacher_others, teacher_positive, gap, _ = teacher
        # masses outside of the positives, everything where there is none
        miss = torch.where(inside, (others - positive).sigmoid(), 1)
        outside = torch.where(inside, (teacher_others - teacher_positive).sigmoid(), 1)
        divergence = (
            torch.where(inside, -F.logsigmoid(positive - others), others)
            - torch.where(inside, -F.logsigmoid(teacher_positive - teacher_others), teacher_others)
            + outside * (gap - teacher_positive + positive)
        )
        total = Wanted(
            total.loss + soft * divergence,
            total.others + soft * miss,
            total.positive + soft * (outside - miss),
            soft * outside,
            total.scale,
        )
    return total


def with_margin(positive: Tensor, scale: Tensor, margin: float) -> tuple[Tensor, Tensor | float]:
    """``scale cos(theta + margin)`` of a logit ``scale cos(theta)``, and its derivative by that."""
    if not margin:
        return positive, 1.0
    cosine = positive / scale
    # the bound keeps the derivative finite at an angle of 0
    tiny = torch.finfo(cosine.dtype).tiny
    square = 1 - cosine.square()
    sine = square.clamp(min=tiny).sqrt()
    target = scale * (cosine * math.cos(margin) - sine * math.sin(margin))
    slope = math.cos(margin) + torch.where(square >= tiny, math.sin(margin) * cosine / sine, 0)
    return target, slope
