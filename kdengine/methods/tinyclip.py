# SPDX-License-Identifier: Apache-2.0
"""TinyCLIP (Wu et al., ICCV 2023, arXiv 2309.12314): affinity mimicking.

    loss = alpha       * 1/2 (KL_rows + KL_cols)      the teacher's affinities, section 3.1
         + (1 - alpha) * 1/2 (CE_rows + CE_cols)      InfoNCE

from one sweep over the similarities of the global batch. The paper's loss is the soft
cross-entropy, which is the KL plus the teacher's entropy: equal gradients, and the value here goes
to 0. Its printed sum of both directions is halved, as in the released code.

Released are ``alpha`` = 1 and both scales pinned to 50 (a temperature of 0.02). Pinned scales are
constants here, from the first step on; the released code overwrites the student's after every step,
and starts at 1/0.07. With ``scale`` None the student's is learned and each teacher's is its own.

The student has usually inherited its weights: ``kdengine inherit``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.methods.base import Method
from kdengine.methods.relational import relational, unit_features
from kdengine.models import Features


class TinyClip(Method):
    """Affinity mimicking, named ``affinity``, and InfoNCE, named ``task``.

    Args:
        num_teachers: how many teachers; the affinity term is the mean of the KL to each.
        alpha: weight of ``affinity``; ``task`` has the rest.
        scale: multiplier of the cosines of student and teachers; None leaves each its own.
        group: the ranks that share a batch, or how features travel between them.
        backend: backend of the losses.
    """

    def __init__(
        self,
        num_teachers: int = 1,
        *,
        alpha: float = 1.0,
        scale: float | None = 50.0,
        group: Group | Exchange = None,
        backend: str = "auto",
    ) -> None:
        super().__init__({"affinity": alpha, "task": 1 - alpha})
        self.num_teachers, self.pinned_scale = num_teachers, scale
        self.exchange, self.backend = Exchange.over(group), backend

    def forward(
        self, student: Features, teachers: Sequence[Features], masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of nonzero weight.

        Shapes: student embeddings [b, D], embeddings of teacher k [b, E_k].

        Gradients: to the student's embeddings, and to its scale where it is not pinned.
        """
        if len(teachers) != self.num_teachers:
            raise ValueError(
                f"TinyClip: expected {self.num_teachers} teachers; {len(teachers)} came; give "
                "those it was built for"
            )
        affinity, terms = "affinity" in self.weights, {}
        if (scale := self.pinned_scale) is not None:
            pinned = (
                x._replace(scale=torch.full_like(x.scale, scale)) for x in (student, *teachers)
            )
            student, *teachers = pinned
        task, mimicked = relational(
            unit_features(student),
            [unit_features(teacher) for teacher in teachers],
            hard="task" in self.weights,
            soft=affinity,
            exchange=self.exchange,
            backend=self.backend,
        )
        if affinity:
            terms["affinity"] = mimicked
        if "task" in self.weights:
            terms["task"] = task
        return terms
