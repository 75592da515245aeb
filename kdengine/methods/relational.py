# SPDX-License-Identifier: Apache-2.0
"""What a student learns of pairs, and of its teachers' view of them, in one sweep."""

from collections.abc import Sequence

from torch import Tensor

from kdengine.distributed import Exchange
from kdengine.losses import similarity_terms, unit_rows
from kdengine.models import Features


def unit_features(features: Features) -> Features:
    """The same with rows of length 1, as losses want them."""
    return Features(unit_rows(features.image), unit_rows(features.text), features.scale)


def relational(
    student: Features,
    teachers: Sequence[Features],
    *,
    hard: bool,
    soft: bool,
    exchange: Exchange,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """InfoNCE and the mean over teachers of the KL to each, both halved over rows and columns.

    Shapes: unit rows of the student [b, D] and of teacher k [b, E_k]. A term that is switched off
    is not computed, and is zero.
    """
    found = similarity_terms(
        *student,
        teacher_query=[teacher.image for teacher in teachers] if soft else None,
        teacher_key=[teacher.text for teacher in teachers] if soft else None,
        teacher_scale=[teacher.scale for teacher in teachers] if soft else None,
        hard_rows=hard,
        hard_cols=hard,
        soft_rows=soft,
        soft_cols=soft,
        group=exchange,
        backend=backend,
    )
    return 0.5 * (found.hard_rows + found.hard_cols), 0.5 * (found.soft_rows + found.soft_cols)
