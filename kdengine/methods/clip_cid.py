# SPDX-License-Identifier: Apache-2.0
"""CLIP-CID (Yang et al., AAAI-25, arXiv 2408.09441): cluster-instance discrimination distillation.

    loss = task       * 1/2 (CE_rows + CE_cols)      InfoNCE on the student's embeddings
         + instance   * 1/2 (KL_rows + KL_cols)      the teacher's similarities of images and texts
         + cluster    * mean CE(image, its cluster)  over centres of all clusters, or a sample
         + cluster_kl * t^2 mean KL(q || p)          the teacher's softmax over clusters

The clusters are those of spherical k-means of the teacher's image embeddings (``kdengine
cluster``), of data that ``kdengine balance`` may have thinned out; the method sees numbers.

Attested (abstract, and summaries of others; no code was released): the three parts, a label for
each image by its nearest centroid, a softmax loss and a KL between teacher and student over
clusters, and an instance part that restores the alignment of images and texts. Reconstructed: all
that follows. Whether InfoNCE stays, weights, scales and sampling are not known; weights are 1 here.

The student's images are compared either with centres of their own width, learned as in Partial FC
("own prototypes"), or, through a linear head, with the teacher's centroids. Targets of the KL are
either stored ones, of the nearest clusters of each image's mean embedding with all others as one,
which needs no product with the teacher's centroids and is at most the KL over all; or the teacher's
softmax over all the step's clusters, of the very crop. Where the step's clusters are a sample, both
are approximate. The latter is the softmax over the sample: what the teacher gives to clusters
outside of it is shared out among those inside. Stored targets keep what the teacher gives to all
others, and the student's rest is of the sample alone: it is pushed up to 1 / ratio times too high.

Several positives are MLCD's (An et al. 2024), the margin ArcFace's with its exact Jacobian.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdengine.centres import Drawn
from kdengine.distributed import Exchange, Group
from kdengine.losses import cluster_terms, unit_rows
from kdengine.methods.base import Method
from kdengine.methods.relational import relational, unit_features
from kdengine.models import Features
from kdengine.models.towers import LOG_SCALE_MAX

LOG_SCALE_START = math.log(1 / 0.07)


class ClipCID(Method):
    """The weighted terms of CLIP-CID, with the head and the scale of its clusters.

    The centres themselves come with every step: see ``kdengine.centres``.

    Args:
        student_width: width of the student's embeddings.
        centre_width: width of the teacher's centroids, to compare with these; None with own ones.
        task: weight of InfoNCE.
        instance: weight of the KL to the similarities of the teachers, their mean.
        cluster: weight of cluster discrimination.
        cluster_kl: weight of the KL over clusters.
        teacher_scale: multiplier of the teacher's cosines with the clusters, which are the targets
            then; None takes the stored ones.
        temperature: divides logits in ``cluster_kl``, see ``losses.cluster_terms``.
        scale: multiplier of the student's cosines with clusters; None learns it from 1 / 0.07.
        margin: an angle.
        positives: nearest clusters that an image belongs to.
        group: the ranks that share a batch and the clusters, or how features travel between them.
        backend: backend of the losses.
    """

    def __init__(
        self,
        student_width: int,
        centre_width: int | None = None,
        *,
        task: float = 1.0,
        instance: float = 1.0,
        cluster: float = 1.0,
        cluster_kl: float = 1.0,
        teacher_scale: float | None = None,
        temperature: float = 1.0,
        scale: float | None = None,
        margin: float = 0.0,
        positives: int = 1,
        group: Group | Exchange = None,
        backend: str = "auto",
    ) -> None:
        weights = {"task": task, "instance": instance, "cluster": cluster, "cluster_kl": cluster_kl}
        super().__init__(weights)
        self.teacher_scale, self.temperature, self.fixed_scale = teacher_scale, temperature, scale
        self.margin, self.positives = margin, positives
        self.needs_teacher = instance > 0 or (cluster_kl > 0 and teacher_scale is not None)
        self.exchange, self.backend = Exchange.over(group), backend
        self.image_head: nn.Module = nn.Identity()
        if centre_width is not None:
            self.image_head = nn.Linear(student_width, centre_width)
        if self._on_clusters() and scale is None:
            self.log_scale = nn.Parameter(torch.tensor([LOG_SCALE_START]))

    def forward(
        self,
        student: Features,
        teachers: Sequence[Features],
        masked: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> dict[str, Tensor]:
        """The terms of nonzero weight, and ``cluster_scale``.

        Shapes: student embeddings [b, D], embeddings of teacher k [b, E_k]; centres of this rank's
        clusters [n, D], or [n, E].

        Gradients: to the student's embeddings and scale, the head, the scale of clusters, and the
        centres, whose gradient is that of the loss over all ranks, not to be averaged.
        """
        terms: dict[str, Tensor] = {}
        hard, soft = "task" in self.weights, "instance" in self.weights
        if hard or soft:
            task, instance = relational(
                unit_features(student),
                [unit_features(teacher) for teacher in teachers],
                hard=hard,
                soft=soft,
                exchange=self.exchange,
                backend=self.backend,
            )
            terms |= {"task": task} if hard else {}
            terms |= {"instance": instance} if soft else {}
        if self._on_clusters():
            if drawn is None:
                raise ValueError(
                    "ClipCID: expected the clusters of the step (kdengine.centres.Drawn), got "
                    "none; give drawn, or set the weights cluster and cluster_kl to 0"
                )
            terms |= self._clustered(student.image, teachers, drawn)
        return terms

    def _clustered(
        self, image: Tensor, teachers: Sequence[Features], drawn: Drawn
    ) -> dict[str, Tensor]:
        """The terms of clusters."""
        hard, soft = "cluster" in self.weights, "cluster_kl" in self.weights
        unit = unit_rows(self.image_head(image))
        scale, centres, assigned = self.cluster_scale(unit), drawn.centres, drawn.assigned
        targets: dict[str, Any] = {}
        if self.positives > 1 or (soft and self.teacher_scale is None):
            targets["nearest"] = assigned.nearest
        if soft and self.teacher_scale is None:
            targets["probabilities"] = assigned.probabilities
        elif soft:
            assert drawn.teacher_centres is not None
            (teacher,) = teachers
            guide = unit_rows(teacher.image.detach())
            targets |= {
                "teacher_image": guide,
                "teacher_centroids": drawn.teacher_centres.to(guide.dtype),
                "teacher_scale": self.teacher_scale,
            }
        found = cluster_terms(
            unit,
            # constants have unit length
            (unit_rows(centres) if centres.requires_grad else centres).to(unit.dtype),
            scale,
            assigned.label,
            **targets,
            margin=self.margin,
            num_positives=self.positives,
            temperature=self.temperature,
            discrimination=hard,
            keys="sharded",
            group=self.exchange,
            backend=self.backend,
        )
        terms = {"cluster": found.discrimination} if hard else {}
        terms |= {"cluster_kl": found.divergence} if soft else {}
        return terms | {"cluster_scale": scale.detach().squeeze()}

    def _on_clusters(self) -> bool:
        """Whether a term looks at clusters."""
        return not self.weights.keys().isdisjoint({"cluster", "cluster_kl"})

    def log_scales(self) -> list[nn.Parameter]:
        """That of the clusters, where it is learned."""
        return [self.log_scale] if hasattr(self, "log_scale") else []

    def cluster_scale(self, like: Tensor) -> Tensor:
        """The multiplier of cosines with clusters, shape [1], on the device of ``like``."""
        if self.fixed_scale is not None:
            return torch.full((1,), self.fixed_scale, device=like.device)
        dtype = torch.promote_types(self.log_scale.dtype, torch.float32)
        return self.log_scale.to(dtype).clamp(0, LOG_SCALE_MAX).exp()
