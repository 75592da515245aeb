# SPDX-License-Identifier: Apache-2.0
"""CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732): InfoNCE + CRD + FD + ICL, and GD, AFD.

One convention for all weights, that of the released code's reductions:

    loss = task * 1/2 (CE_rows + CE_cols)                       InfoNCE on the student's embeddings
         + crd  * 1/2 (KL_rows + KL_cols)                       teacher's relations, eq. 4-10
         + fd   * (mse(image, t_image) + mse(text, t_text))     mean over batch and width, eq. 11
         + icl  * 1/2 (CE(image, t_text) + CE(text, t_image))   student against teacher, eq. 14-16
         + gd   * (mse(g_image, t_g_image) + mse(g_text, t_g_text))   gradients of InfoNCE, eq. 13
         + afd  * InfoNCE(fuse(image, t_image), fuse(text, t_text))   one layer a modality, eq. 17

The paper's printed CRD has no 1/2 and its printed FD sums over the width, so its lambda_CRD = 1 is
crd = 2 here, and its lambda_FD = x is fd = x * width; the published numbers were made with crd = 1
and fd = 2000, without GD and AFD. InfoNCE and CRD use the student's own width; FD, ICL and GD
compare in the teacher's, through one linear head a modality (raw embedding -> head -> normalise)
when the widths differ; AFD fuses both widths. GD falls as 1/N^2 when the global batch N grows, so
its weight belongs to a batch.

With ``mask_ratio`` FD is MFD, eq. 12: the student's image embedding comes from a random part of its
patches, the teacher sees the whole image. The paper does not say what the other terms see: the
whole image here, unless ``mask_all``.

With several teachers CRD is the mean of the KL to each, at its own scale. The other terms see one
teacher made of all (``losses.ensemble``): their unit rows side by side, so that a cosine is the
mean of theirs, or, with ``teacher_features="mean"``, the direction of their sum; its scale, which
GD needs, is the mean of theirs. Side by side the width is the sum, which a weight of FD by "mean"
depends on; ``fd_reduction="sum"`` does not.

The scales of ICL and AFD are learned. They are exp of parameters that start at ln(1/0.07), as the
paper says. The released code differs in this, in GD and in MFD: ``reference_quirks=True`` follows
it; the table in ``kdengine/losses/quirks.py`` lists each difference with its effect.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdengine.distributed import Exchange, Group
from kdengine.losses import (
    augmented_feature,
    ensemble,
    ensemble_width,
    gradient,
    interactive_contrastive,
    unit_feature,
    unit_rows,
)
from kdengine.losses.quirks import released_gradient
from kdengine.methods.base import Method
from kdengine.methods.likeness import Heads
from kdengine.methods.relational import relational, unit_features
from kdengine.models import Features
from kdengine.models.towers import LOG_SCALE_MAX

logger = logging.getLogger(__name__)
LOG_SCALE_START = math.log(1 / 0.07)


class ClipKD(Method):
    """The weighted terms of CLIP-KD, with its heads and the scale of ICL.

    Args:
        student_width: width of the student's embeddings.
        teacher_widths: width of each teacher's.
        task: weight of InfoNCE.
        crd: weight of contrastive relational distillation.
        fd: weight of feature distillation.
        fd_reduction: "mean" over the width, or "sum", whose weight suits any width; the term is
            then called ``fd_sum``.
        icl: weight of interactive contrastive learning.
        gd: weight of gradient distillation.
        afd: weight of augmented feature distillation.
        mask_ratio: share of the student's patches that FD hides from it, which makes it MFD.
        mask_all: all terms see the masked image, from one pass of the student instead of two.
        teacher_features: how FD, ICL, GD and AFD see several teachers, see ``ensemble``.
        reference_quirks: compute what the released code computes, see ``losses.quirks``.
        group: the ranks that share a batch, or how features travel between them.
        backend: backend of the losses.
    """

    def __init__(
        self,
        student_width: int,
        teacher_widths: Sequence[int],
        *,
        task: float = 1.0,
        crd: float = 1.0,
        fd: float = 2000.0,
        fd_reduction: str = "mean",
        icl: float = 1.0,
        gd: float = 0.0,
        afd: float = 0.0,
        mask_ratio: float = 0.0,
        mask_all: bool = False,
        teacher_features: str = "concat",
        reference_quirks: bool = False,
        group: Group | Exchange = None,
        backend: str = "auto",
    ) -> None:
        self.fd_name = "fd" if fd_reduction == "mean" else f"fd_{fd_reduction}"
        weights = {"task": task, "crd": crd, self.fd_name: fd, "icl": icl, "gd": gd, "afd": afd}
        super().__init__(weights)
        self.exchange, self.backend = Exchange.over(group), backend
        if mask_ratio and not fd:
            raise ValueError(
                f"ClipKD: mask_ratio makes FD the masked MFD, but fd is 0; mask_ratio={mask_ratio} "
                "came; give fd a weight, or no mask"
            )
        if reference_quirks:
            self._check_released(student_width, teacher_widths)
            if mask_ratio and self.exchange.rank == 0:
                logger.warning(
                    "ClipKD: mask_ratio=%g is ignored, as the released code ignores it: with "
                    "reference_quirks MFD is FD",
                    mask_ratio,
                )
            mask_ratio, mask_all = 0.0, False
        self.teacher_widths, self.teacher_features = list(teacher_widths), teacher_features
        self.fd_reduction = fd_reduction
        self.mask_ratio, self.mask_all = mask_ratio, mask_all
        self.reference_quirks = reference_quirks
        self.image_head: nn.Module = nn.Identity()
        self.text_head: nn.Module = nn.Identity()
        uses_features = self._compares() or "afd" in self.weights
        width = ensemble_width(teacher_widths, teacher_features) if uses_features else student_width
        if self._compares() and student_width != width:
            self.image_head = nn.Linear(student_width, width)
            self.text_head = nn.Linear(student_width, width)
        # scales have the shape [1]: deepspeed cannot broadcast a 0-D parameter
        if "icl" in self.weights:
            self.log_scale = nn.Parameter(torch.tensor([LOG_SCALE_START]))
        if "afd" in self.weights:
            self.image_fusion = nn.Linear(student_width + width, student_width)
            self.text_fusion = nn.Linear(student_width + width, student_width)
            self.fused_log_scale = nn.Parameter(torch.tensor([LOG_SCALE_START]))

    def _check_released(self, student_width: int, teacher_widths: Sequence[int]) -> None:
        """Refuse what the released code cannot do, for ``reference_quirks``."""
        if len(teacher_widths) != 1:
            raise ValueError(
                "ClipKD: with reference_quirks one teacher is expected, because the released code "
                f"has one teacher; {len(teacher_widths)} came; name one, or leave out "
                "reference_quirks"
            )
        if "afd" in self.weights and student_width != teacher_widths[0]:
            raise ValueError(
                "ClipKD: there is nothing to reproduce: the released AFD fails where the widths "
                f"differ; {student_width} and {teacher_widths[0]} came; set afd to 0, or leave out "
                "reference_quirks"
            )

    def forward(
        self, student: Features, teachers: Sequence[Features], masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of nonzero weight.

        Shapes: student embeddings and ``masked`` [b, D], embeddings of teacher k [b, E_k].

        Gradients: to the student's embeddings and scale, the heads, the fusions and their scales.
        """
        if len(teachers) != len(self.teacher_widths):
            raise ValueError(
                f"ClipKD: expected {len(self.teacher_widths)} teachers, of widths "
                f"{self.teacher_widths}; {len(teachers)} came; give those it was built for"
            )
        terms: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        compared = together = None
        if self._compares() or "afd" in self.weights:
            teacher = self._together(teachers)
        # unit rows are made once, and shared by all terms
        if self._compares():
            raw = Features(self.image_head(student.image), self.text_head(student.text), student[2])
            compared, features = self._features(raw, teacher, masked)
        is_shared = isinstance(self.image_head, nn.Identity)
        own = compared if compared and is_shared else unit_features(student)
        only_own = self.weights.keys() <= {"task", self.fd_name}
        theirs = [] if only_own else [unit_features(teacher) for teacher in teachers]
        if not self.weights.keys().isdisjoint({"icl", "gd", "afd"}):
            together = theirs[0] if len(theirs) == 1 else unit_features(teacher)
        with self.exchange.once(*([together.text.detach()] if together and self._shares() else [])):
            if "task" in self.weights or "crd" in self.weights:
                terms |= self._relational(own, theirs)
            if compared and together:
                terms |= self._compared(compared, together)
        terms |= features
        if "afd" in self.weights and together:
            terms |= self._fused(own, together)
        return terms

    def _shares(self) -> bool:
        """Whether several terms have the texts of the teachers as one for keys."""
        with_relations = {"crd"} if len(self.teacher_widths) == 1 else set()
        return len(self.weights.keys() & ({"icl", "gd"} | with_relations)) > 1

    def _together(self, teachers: Sequence[Features]) -> Features:
        """The teachers as one, whose scale is the mean of theirs."""
        if len(teachers) == 1:
            return teachers[0]
        images, texts, scales = zip(*teachers, strict=True)
        return Features(
            ensemble(images, self.teacher_features),
            ensemble(texts, self.teacher_features),
            torch.stack([scale.reshape(()) for scale in scales]).mean(),
        )

    def heads(self, teacher: int) -> Heads | None:
        """Those of FD, ICL and GD; side by side, each teacher has its own columns."""
        if not self._compares():
            return None
        if self.teacher_features == "mean":
            return Heads(self.image_head, self.text_head)
        first = sum(self.teacher_widths[:teacher])
        columns = slice(first, first + self.teacher_widths[teacher])
        return Heads(self.image_head, self.text_head, columns)

    def _compares(self) -> bool:
        """Whether a term compares embeddings in the teacher's width."""
        return not self.weights.keys().isdisjoint({self.fd_name, "icl", "gd"})

    def _features(
        self, student: Features, teacher: Features, masked: Tensor | None
    ) -> tuple[Features, dict[str, Tensor]]:
        """Unit rows of the student in the teacher's width, and FD where it has a weight."""
        if self.fd_name not in self.weights:
            return unit_features(student), {}
        is_masked = masked is not None and not self.mask_all
        image = self.image_head(masked) if is_masked else student.image
        loss, (image, text) = unit_feature(
            [image, student.text],
            [teacher.image, teacher.text],
            reduction=self.fd_reduction,
            backend=self.backend,
        )
        if is_masked:
            image = unit_rows(student.image)
        return Features(image, text, student.scale), {self.fd_name: loss}

    def _compared(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """ICL and GD, of unit rows in the teacher's width."""
        terms = {}
        options: dict[str, Any] = {"group": self.exchange, "backend": self.backend}
        if "icl" in self.weights:
            multiplier = self.interactive_scale()
            keys = teacher.image.detach(), teacher.text.detach()
            terms["icl"] = interactive_contrastive(
                student.image, student.text, multiplier, *keys, **options
            )
            terms["icl_scale"] = multiplier.detach().squeeze()
        if "gd" in self.weights:
            if self.reference_quirks:
                terms["gd"] = released_gradient(*student, *teacher, group=self.exchange)
            else:
                terms["gd"] = gradient(*student, *teacher, **options)
        return terms

    def _fused(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """AFD, of unit rows, and its scale for the log."""
        multiplier = self._multiplier(self.fused_log_scale)
        loss = augmented_feature(
            student.image,
            student.text,
            multiplier,
            teacher.image.to(student.image.dtype).detach(),
            teacher.text.to(student.text.dtype).detach(),
            self.image_fusion,
            self.text_fusion,
            group=self.exchange,
            backend=self.backend,
        )
        return {"afd": loss, "afd_scale": multiplier.detach().squeeze()}

    def _relational(self, student: Features, teachers: Sequence[Features]) -> dict[str, Tensor]:
        """InfoNCE and CRD of unit rows, the mean over teachers, from one sweep."""
        terms = {}
        task, crd = relational(
            student,
            teachers,
            hard="task" in self.weights,
            soft="crd" in self.weights,
            exchange=self.exchange,
            backend=self.backend,
        )
        if "task" in self.weights:
            terms["task"] = task
        if "crd" in self.weights:
            terms["crd"] = crd
        return terms

    def log_scales(self) -> list[nn.Parameter]:
        """Those of ICL and AFD; none under ``reference_quirks``, where they are no logarithms."""
        if self.reference_quirks:
            return []
        names = {"icl": "log_scale", "afd": "fused_log_scale"}
        return [getattr(self, name) for term, name in names.items() if term in self.weights]

    def interactive_scale(self) -> Tensor:
        """The multiplier of ICL's similarities, shape [1]."""
        return self._multiplier(self.log_scale)

    def _multiplier(self, log_scale: Tensor) -> Tensor:
        log_scale = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))
        return log_scale if self.reference_quirks else log_scale.clamp(0, LOG_SCALE_MAX).exp()
