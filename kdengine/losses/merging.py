# SPDX-License-Identifier: Apache-2.0
"""Statistics of parts of a matrix: packed for their way, merged into those of the whole."""

import torch
from torch import Tensor

from kdengine.ops import Statistics


def pack(side: Statistics) -> Tensor:
    """All numbers of a side in one tensor, (F, n)."""
    vectors = [side.others, side.positive, *([side.mean] if side.mean.numel() else [])]
    teachers = side[3:] if len(side.gap) else ()
    return torch.cat([torch.stack(vectors), *teachers])


def unpack(packed: Tensor, means: bool, num_teachers: int) -> Statistics:
    """The side of what ``pack`` made, (F, ...)."""
    num_vectors = 3 if means else 2
    others, positive, *mean = packed[:num_vectors]
    teachers = packed[num_vectors:].unflatten(0, (4, num_teachers))
    return Statistics(
        others,
        positive,
        mean[0].detach() if means else packed.new_empty(0),
        teachers[0].detach(),
        teachers[1].detach(),
        teachers[2],
        teachers[3].detach(),
    )


def merge(parts: Statistics) -> Statistics:
    """Statistics over a disjoint union, from those of its W parts (dimension -2)."""

    def blend(values: Tensor, lse: Tensor) -> Tensor:
        return (lse.detach().softmax(-2) * values).sum(-2)

    merged = parts._replace(
        others=parts.others.logsumexp(-2),
        # at most one part has the positive; the others say 0
        positive=parts.positive.sum(-2),
        mean=blend(parts.mean, parts.others) if parts.mean.numel() else parts.mean,
    )
    if not len(parts.gap):
        return merged
    return merged._replace(
        teacher_others=parts.teacher_others.logsumexp(-2),
        teacher_positive=parts.teacher_positive.sum(-2),
        gap=blend(parts.gap, parts.teacher_others),
        teacher_mean=blend(parts.teacher_mean, parts.teacher_others),
    )


def with_scale(side: Statistics, scale: Tensor) -> Statistics:
    """The same numbers with a gradient to scale: d z / d scale = z / scale in every mean."""
    # 0 in value, 1 / scale in derivative
    rate = (scale - scale.detach()) / scale.detach()
    under_teacher = side.teacher_mean - side.gap.detach()
    return side._replace(
        others=side.others + rate * side.mean,
        positive=side.positive + rate * side.positive.detach(),
        gap=side.gap - rate * under_teacher,
    )
