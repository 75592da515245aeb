# SPDX-License-Identifier: Apache-2.0
"""CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732): InfoNCE + CRD + FD + ICL.

One convention for all weights, that of the released code's reductions:

    loss = task * 1/2 (CE_rows + CE_cols)                       InfoNCE on the student's embeddings
         + crd  * 1/2 (KL_rows + KL_cols)                       teacher's relations, eq. 4-10
         + fd   * (mse(image, t_image) + mse(text, t_text))     mean over batch and width, eq. 11
         + icl  * 1/2 (CE(image, t_text) + CE(text, t_image))   student against teacher, eq. 14-16

The paper's printed CRD has no 1/2 and its printed FD sums over the width, so its lambda_CRD = 1 is
crd = 2 here, and its lambda_FD = x is fd = x * width; the published numbers were made with crd = 1
and fd = 2000. InfoNCE and CRD use the student's own width; FD and ICL compare in the teacher's,
through one linear head a modality (raw embedding -> head -> normalise) when the widths differ.

The scale of ICL is learned. It is exp of a parameter that starts at ln(1/0.07), as the paper says;
the released code forgets the exp, so that its scale starts at 2.66 and is not clamped:
``reference_quirks=True`` reproduces that.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kdengine.losses import feature, interactive_contrastive, similarity_terms
from kdengine.methods.base import Method
from kdengine.models import Features
from kdengine.models.towers import LOG_SCALE_MAX

LOG_SCALE_START = math.log(1 / 0.07)


class ClipKD(Method):
    """The weighted terms of CLIP-KD, with its heads and the scale of ICL.

    Args:
        student_width: width of the student's embeddings.
        teacher_width: width of the teacher's.
        task: weight of InfoNCE.
        crd: weight of contrastive relational distillation.
        fd: weight of feature distillation.
        icl: weight of interactive contrastive learning.
        reference_quirks: use the ICL scale raw, as the released code does.
        group: the ranks that share a batch; None for one process.
        backend: backend of the losses.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        task: float = 1.0,
        crd: float = 1.0,
        fd: float = 2000.0,
        icl: float = 1.0,
        reference_quirks: bool = False,
        group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__({"task": task, "crd": crd, "fd": fd, "icl": icl})
        self.reference_quirks = reference_quirks
        self.group, self.backend = group, backend
        compared = "fd" in self.weights or "icl" in self.weights
        self.image_head: nn.Module = nn.Identity()
        self.text_head: nn.Module = nn.Identity()
        if compared and student_width != teacher_width:
            self.image_head = nn.Linear(student_width, teacher_width)
            self.text_head = nn.Linear(student_width, teacher_width)
        if "icl" in self.weights:
            # shape [1]: deepspeed cannot broadcast a 0-D parameter
            self.log_scale = nn.Parameter(torch.tensor([LOG_SCALE_START]))

    def forward(self, student: Features, teacher: Features | None) -> dict[str, Tensor]:
        """The terms of nonzero weight.

        Shapes: student embeddings [b, D], teacher embeddings [b, E].

        Gradients: to the student's embeddings and scale, the heads and the ICL scale.
        """
        assert teacher is not None
        terms: dict[str, Tensor] = {}
        if "task" in self.weights or "crd" in self.weights:
            terms |= self._relational(student, teacher)
        if "fd" in self.weights or "icl" in self.weights:
            image, text = self.image_head(student.image), self.text_head(student.text)
            if "fd" in self.weights:
                terms["fd"] = feature(
                    image, teacher.image, normalize=True, backend=self.backend
                ) + feature(text, teacher.text, normalize=True, backend=self.backend)
            if "icl" in self.weights:
                terms["icl"] = interactive_contrastive(
                    image,
                    text,
                    self.interactive_scale(),
                    teacher.image.detach(),
                    teacher.text.detach(),
                    normalize=True,
                    group=self.group,
                    backend=self.backend,
                )
                terms["icl_scale"] = self.interactive_scale().detach().squeeze()
        return terms

    def _relational(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """InfoNCE and CRD from one sweep over the student's similarities."""
        crd = "crd" in self.weights
        found = similarity_terms(
            student.image,
            student.text,
            student.scale,
            teacher_query=teacher.image if crd else None,
            teacher_key=teacher.text if crd else None,
            teacher_scale=teacher.scale if crd else None,
            hard_rows="task" in self.weights,
            hard_cols="task" in self.weights,
            soft_rows=crd,
            soft_cols=crd,
            normalize=True,
            group=self.group,
            backend=self.backend,
        )
        terms = {}
        if "task" in self.weights:
            terms["task"] = 0.5 * (found.hard_rows + found.hard_cols)
        if crd:
            terms["crd"] = 0.5 * (found.soft_rows + found.soft_cols)
        return terms

    def log_scales(self) -> list[nn.Parameter]:
        """The log scale of ICL; none under ``reference_quirks``, where it is not a logarithm."""
        return [self.log_scale] if "icl" in self.weights and not self.reference_quirks else []

    def interactive_scale(self) -> Tensor:
        """The multiplier of ICL's similarities, shape [1]."""
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return log_scale if self.reference_quirks else log_scale.clamp(0, LOG_SCALE_MAX).exp()
