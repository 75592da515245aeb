# SPDX-License-Identifier: Apache-2.0
"""Alignment of a batch's moments, over the batch of all ranks."""

from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.ops import moments


def moment_alignment(
    student: Tensor,
    teacher: Tensor,
    *,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """IFAlign: the batch's mean and variance of every feature dimension match the teacher's.

    ``1/E sum_d |mean_d - mean_d^teacher| + 1/E sum_d |var_d - var_d^teacher|``, biased variance,
    of the rows of all ranks

    Shapes: student, teacher (b, E), the same on every rank.
    Returns: 0-D, the same on every rank; float64 if an input is, else float32.
    Gradients: student, exactly those of one process with all rows (see ``distributed``).
    Memory: as the op ``moments``. Communication: two all-reduces of 2 E.
    Raises: ValueError for unequal shapes, no rows, other rows elsewhere, a teacher with a gradient.
    Source: ComKD-CLIP, whose moments and L1 norms are attested; the mean over dimensions and the
    biased variance are PromptAlign's, reconstructed here. At a batch of 8 and width 768 the
    variances' part is some 20 times smaller than the means'.
    """
    who, group = "moment_alignment", Exchange.over(group).group
    inputs.check_pair(who, "student", student, "teacher", teacher)
    inputs.check_constant(who, teacher=teacher)
    if student.shape != teacher.shape or not len(student):
        raise ValueError(
            f"{who}: student and teacher need one shape, of at least one row; "
            f"{tuple(student.shape)} and {tuple(teacher.shape)} came"
        )
    if group is not None:
        rows = distributed.gather_numbers({"rows": len(student)}, group, student.device)
        distributed.require_even(who, "student", rows["rows"])
    mean, variance = moments(student, teacher, backend=backend)
    whole = distributed.average(mean, group)
    # about the mean of all ranks, by which the variance's own derivative is zero
    variance = distributed.average(variance + (mean - whole.detach()).square(), group)
    return (whole[0] - whole[1]).abs().mean() + (variance[0] - variance[1]).abs().mean()
