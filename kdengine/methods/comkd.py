# SPDX-License-Identifier: Apache-2.0
"""ComKD-CLIP (Chen et al., arXiv 2408.04145): a teacher by prompts, its student without labels.

Stage 1, ``comkd_teacher``: prompts in both towers of a frozen CLIP, by the cross-entropy of images
of k shots over the texts of their classes. Stage 2, ``comkd``: prompts in the image tower of a
small frozen CLIP and a bridge into the teacher's space (``models.bridge``), on images without
labels:

    loss = kl    * t^2 KL(softmax(teacher's logits / t) || softmax(student's logits / t))
         + align * (mean |mean_d - mean_d^teacher| + mean |var_d - var_d^teacher|)     IFAlign

over the texts W of all N classes, encoded by the teacher, the student's logits being those of its
embedding behind EduAttention, with its own frozen scale, the teacher's with the teacher's. Without
IFAlign (``align`` = 0) and EduAttention (a bridge without keys) it is PromptKD (Li et al., CVPR
2024). IFAlign compares unit embeddings of the same crop before EduAttention.

KL: ``kl_reduction`` "sum" adds over the classes and means over images, as all losses here do: its
weight is that of an image, whatever N. "mean" divides by N as well, which is PromptKD's arithmetic,
sum / (B N), and goes with its weight of 1000 (200 for Aircraft, Flowers and DTD): an image's KL
then weighs 1000 / N, 100 for EuroSAT's 10 classes and 1 for ImageNet's, and IFAlign's part of the
loss changes with N by as much.

Attested (abstract and a reading note of the method; no code was released): both stages, frozen
teacher, the student's prompts and projector, means and variances in L1, KL from teacher to student,
EduAttention and its gate, the sum of both losses. Reconstructed: weights and temperature, L1 as a
mean over dimensions with a biased variance, what EduAttention is made of, the projector and the
prompts' form (PromptKD's). Stage 1 is cross-entropy alone: PromptSRC's regularisers and its
averaging of prompts, with which PromptKD's published teachers were made, are not part of it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.losses import cluster_cross_entropy, logit_kl, moment_alignment
from kdengine.methods.classes import ClassMethod
from kdengine.models import Features, TwoTower


class ComKDTeacher(ClassMethod):
    """Stage 1: the cross-entropy of labelled images, named ``task``.

    Args:
        class_tokens: [N, context], the texts of the classes.
        backend: backend of the loss.
    """

    needs_teacher = False
    class_tokens: Tensor

    def __init__(self, class_tokens: Tensor, *, backend: str = "auto") -> None:
        super().__init__({"task": 1.0})
        self.backend = backend
        # of the data: no part of a checkpoint
        self.register_buffer("class_tokens", class_tokens, persistent=False)

    def forward(
        self, student: TwoTower, image: Tensor, label: Tensor, teachers: Sequence[Features]
    ) -> dict[str, Tensor]:
        """The term, and ``accuracy``, the share of images nearest to their own class.

        Gradients: to the prompts of both towers.
        """
        own = student(image, self.class_tokens)
        unit, text = _unit(own.image), _unit(own.text)
        task = cluster_cross_entropy(unit, text, own.scale, label, backend=self.backend)
        nearest = (unit.detach() @ text.detach().T).argmax(1)
        return {"task": task, "accuracy": (nearest == label).float().mean()}


class ComKD(ClassMethod):
    """Stage 2: ``kl`` and ``align``, and PromptKD.

    Args:
        kl: weight of the KL of logits.
        kl_reduction: "sum" over classes, or "mean"; the term is then called ``kl_mean``.
        temperature: t.
        align: weight of IFAlign.
        group: the ranks that share a batch, whose moments IFAlign takes; None for one process.
        backend: backend of the losses.
    """

    def __init__(
        self,
        *,
        kl: float = 1.0,
        kl_reduction: str = "sum",
        temperature: float = 1.0,
        align: float = 1.0,
        group: Group | Exchange = None,
        backend: str = "auto",
    ) -> None:
        self._kl = "kl_mean" if kl_reduction == "mean" else "kl"
        super().__init__({self._kl: kl, "align": align})
        self.temperature = temperature
        self.exchange, self.backend = Exchange.over(group), backend

    def forward(
        self, student: TwoTower, image: Tensor, label: Tensor, teachers: Sequence[Features]
    ) -> dict[str, Tensor]:
        """The terms of nonzero weight; labels are not looked at.

        Beside them ``gate``, EduAttention's, and ``agreement``, the share of images for which
        student and teacher name the same class.

        Gradients: to the student's prompts and bridge.
        """
        (teacher,) = teachers
        unit, fused = student.bridged_image(image)
        fused, guide = _unit(fused), _unit(teacher.image)
        text = teacher.text.to(fused.dtype)
        terms = {}
        if self._kl in self.weights:
            divergence = logit_kl(
                fused,
                text,
                student.scale(),
                guide,
                text,
                teacher.scale,
                temperature=self.temperature,
                backend=self.backend,
            )
            terms[self._kl] = divergence / (len(text) if self._kl == "kl_mean" else 1)
        if "align" in self.weights:
            terms["align"] = moment_alignment(
                unit, guide, group=self.exchange, backend=self.backend
            )
        with torch.no_grad():
            same = (fused @ text.T).argmax(1) == (guide @ text.T).argmax(1)
            terms["agreement"] = same.float().mean()
        if (gate := student.gate()) is not None:
            terms["gate"] = gate.detach().squeeze()
        return terms


def _unit(rows: Tensor) -> Tensor:
    """Unit rows in fp32: logits at scale 100 and moments want its digits."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
