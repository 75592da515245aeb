# SPDX-License-Identifier: Apache-2.0
"""How alike student and teacher embed a batch: the numbers CLIP-KD explains its gains with.

Both are for reading: computed in fp32 (float64 for float64) also under autocast, without gradient,
without a host synchronisation. The oracle is in ``kdengine.reference``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# the unbiased HSIC divides by N - 3
MIN_ROWS = 4


@torch.no_grad()
def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean cosine of corresponding rows.

    ``1/N sum_i <student_i, teacher_i> / (||student_i|| ||teacher_i||)``

    Shapes: student, teacher (N, E), of any length. Returns: 0-D, from -1 to 1. Memory: O(N E).
    Raises: ValueError for unequal shapes.
    Source: CLIP-KD Fig. 3.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"mean_cosine: student is {_show(student)} but teacher is {_show(teacher)}; both need "
            "the same rows and width; project the student into the teacher's width first"
        )
    x, y = _units(student, teacher)
    return (x * y).sum(1).mean()


@torch.no_grad()
def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Whether student and teacher arrange a batch alike: debiased linear CKA of unit rows.

    ``H(X, Y) / sqrt(H(X, X) H(Y, Y))``; of centred columns, x_i = ||X_i||^2 and y_i = ||Y_i||^2,

    ``H(X, Y) = ||X^T Y||_F^2 - N/(N-2) sum_i x_i y_i + sum_i x_i sum_i y_i / ((N-1) (N-2))``

    which is N (N - 3) times the unbiased HSIC, whose row sums vanish up to the diagonal when the
    columns are centred. The biased CKA of a batch is near 1 for anything when N << D. Rows are
    made unit first, because that is what similarities see of them.

    Shapes: student X (N, D), teacher Y (N, E). Unchanged by rotations of either.
    Returns: 0-D; 1 for equal arrangements, about 0 for independent ones, which may be negative;
    nan for N < 4 and where all rows of one are equal.
    Memory: O(N (D + E)) and the smaller of N x N and D x E (D x D, E x E).
    Raises: ValueError for unequal numbers of rows.
    Source: Kornblith et al. 2019; unbiased HSIC: Song et al. 2012, as in Nguyen et al. 2021.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"linear_cka: student is {_show(student)} but teacher is {_show(teacher)}; both need "
            "the same rows, in the same order"
        )
    x, y = map(_centred, _units(student, teacher))
    if len(x) < MIN_ROWS:
        return x.new_full((), math.nan)
    with torch.autocast(x.device.type, enabled=False):
        return _hsic(x, y) / (_hsic(x, x) * _hsic(y, y)).sqrt()


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased HSIC of centred columns, times N (N - 3)."""
    num = len(x)
    if num * num < x.shape[1] * y.shape[1]:
        overlap = ((x @ x.mT) * (y @ y.mT)).sum()
    else:
        overlap = (x.mT @ y).square().sum()
    k, ell = x.square().sum(1), y.square().sum(1)
    return overlap - num / (num - 2) * (k @ ell) + k.sum() * ell.sum() / ((num - 1) * (num - 2))


def _centred(x: Tensor) -> Tensor:
    """Columns of mean 0, the whole of length 1; nan where all rows are equal."""
    # the first row goes first, or rounding would make an arrangement of equal rows
    x = x - x[:1]
    x = x - x.mean(0)
    return x / torch.linalg.vector_norm(x)


def _units(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return F.normalize(student.to(dtype), dim=1), F.normalize(teacher.to(dtype), dim=1)


def _show(x: Tensor) -> str:
    return str(tuple(x.shape))
