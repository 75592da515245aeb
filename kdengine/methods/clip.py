# SPDX-License-Identifier: Apache-2.0
"""Plain CLIP training, without a teacher (Radford et al. 2021)."""

from collections.abc import Sequence

from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.losses import similarity_loss
from kdengine.methods.base import Method
from kdengine.models import Features


class Clip(Method):
    """InfoNCE over the global batch: ``1/2 CE(rows) + 1/2 CE(columns)``."""

    needs_teacher = False

    def __init__(self, *, group: Group | Exchange = None, backend: str = "auto") -> None:
        super().__init__({"task": 1.0})
        self.exchange, self.backend = Exchange.over(group), backend

    def forward(
        self, student: Features, teachers: Sequence[Features], masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The InfoNCE term, named ``task``; teachers are ignored."""
        task = similarity_loss(
            student.image,
            student.text,
            student.scale,
            normalize=True,
            group=self.exchange,
            backend=self.backend,
        )
        return {"task": task}
