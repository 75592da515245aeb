# SPDX-License-Identifier: Apache-2.0
"""What a student learns of pairs, and of its teachers' view of them, in one sweep."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from kdengine.losses import similarity_terms
from kdengine.models import Features


def relational(
    student: Features,
    teachers: Sequence[Features],
    *,
    hard: bool,
    soft: bool,
    normalize: bool = True,
    group: ProcessGroup | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """InfoNCE and the mean over teachers of the KL to each, both halved over rows and columns.

    Shapes: student embeddings [b, D], embeddings of teacher k [b, E_k]; of unit length without
    ``normalize``. A term that is switched off is not computed, and is zero.
    """
    found = similarity_terms(
        student.image,
        student.text,
        student.scale,
        teacher_query=[teacher.image for teacher in teachers] if soft else None,
        teacher_key=[teacher.text for teacher in teachers] if soft else None,
        teacher_scale=[teacher.scale for teacher in teachers] if soft else None,
        hard_rows=hard,
        hard_cols=hard,
        soft_rows=soft,
        soft_cols=soft,
        normalize=normalize,
        group=group,
        backend=backend,
    )
    return 0.5 * (found.hard_rows + found.hard_cols), 0.5 * (found.soft_rows + found.soft_cols)
