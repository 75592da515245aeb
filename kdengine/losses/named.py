# SPDX-License-Identifier: Apache-2.0
"""The papers' losses by name: the functions of ``kdengine.reference`` with group and backend.

With a group each rank returns the loss of its own part and the mean over ranks is the loss; see
``similarity_terms``. Scales multiply; teachers are constants.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Scale, Teachers, TeacherScales
from kdengine.losses.rows import row_loss
from kdengine.losses.similarity import similarity_loss
from kdengine.ops import feature as feature_op
from kdengine.ops import unit_feature as unit_feature_op


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    *,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """CLIP's contrastive loss: each image names its text and each text its image.

    ``1/2 [mean_i CE(scale image text^T, i) + mean_j CE(scale text image^T, j)]``

    Shapes: image, text (N, D). Returns: 0-D, nats. Gradients: image, text, scale.
    Memory, communication, raises: as ``similarity_terms``. Source: CLIP (Radford et al. 2021).
    """
    return similarity_loss(image, text, scale, group=group, backend=backend)


def contrastive_relational(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Teachers,
    teacher_text: Teachers,
    teacher_scale: TeacherScales,
    *,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """CRD, affinity mimicking: the teacher's softmaxes over the batch are the student's targets.

    ``1/2 [mean_i KL(q_i || p_i) + mean_j KL(q_j || p_j)]``

    Shapes: image, text (N, D), teacher_image, teacher_text (N, E), or tuples of them.
    Returns: 0-D, nats. Gradients: image, text, scale.
    Memory, communication, raises: as ``similarity_terms``.
    Source: CLIP-KD eq. 4-10, with the 1/2 of its code. ``similarity_terms`` gives it together with
    ``info_nce`` for one sweep instead of two.
    """
    return similarity_loss(
        image,
        text,
        scale,
        teacher_query=teacher_image,
        teacher_key=teacher_text,
        teacher_scale=teacher_scale,
        hard_rows=0.0,
        hard_cols=0.0,
        soft_rows=0.5,
        soft_cols=0.5,
        group=group,
        backend=backend,
    )


def interactive_contrastive(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    normalize: bool = False,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """ICL: a student anchor finds the teacher's embedding of the other modality.

    ``1/2 [mean_i CE(scale image teacher_text^T, i) + mean_i CE(scale text teacher_image^T, i)]``

    Shapes: image, text, teacher_image, teacher_text (N, E): the student in the teacher's width.
    Returns: 0-D, nats. Gradients: image, text, scale; the constant keys cost no product.
    Memory, communication, raises: as ``similarity_terms``; no gradient travels.
    Source: CLIP-KD eq. 14-16; scale is the multiplier, where its code uses a raw parameter.
    """
    who = "interactive_contrastive"
    inputs.check_constant(who, teacher_image=teacher_image, teacher_text=teacher_text)

    def rows_only(query: Tensor, key: Tensor) -> Tensor:
        return similarity_loss(
            query,
            key,
            scale,
            hard_cols=0.0,
            normalize=normalize,
            group=group,
            backend=backend,
        )

    return rows_only(image, teacher_text) + rows_only(text, teacher_image)


def augmented_feature(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_fusion: Callable[[Tensor], Tensor],
    text_fusion: Callable[[Tensor], Tensor],
    *,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """AFD: InfoNCE of student and teacher embeddings, fused by one learned layer a modality.

    ``info_nce(f(image, teacher_image), f(text, teacher_text), scale)``,
    ``f(x, u) = normalize(fusion([x || u]))``

    Shapes: image, text (N, D), teacher_image, teacher_text (N, E), all L2-normalised; a fusion maps
    (N, D + E) to (N, any width), e.g. ``nn.Linear(D + E, D)``. Returns: 0-D, nats.
    Gradients: image, text, scale, and the fusions' parameters.
    Memory, communication, raises: as ``similarity_terms``; teachers are constants.
    Source: CLIP-KD eq. 17. Its released code fails where the widths differ.
    """
    inputs.check_constant(
        "augmented_feature", teacher_image=teacher_image, teacher_text=teacher_text
    )
    fused_image = image_fusion(torch.cat([image, teacher_image], 1))
    fused_text = text_fusion(torch.cat([text, teacher_text], 1))
    return similarity_loss(
        fused_image, fused_text, scale, normalize=True, group=group, backend=backend
    )


def cluster_cross_entropy(
    image: Tensor,
    centroids: Tensor,
    scale: Scale,
    labels: Tensor,
    margin: float = 0.0,
    *,
    keys: str = "replicated",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """Cluster discrimination: each image names its cluster, with an additive angular margin.

    ``mean_i softplus(lse_{k != l} scale cos theta_ik - scale cos(theta_il + margin))``,
    l = labels_i

    Shapes: image (B, D), centroids (K, D), labels (B,) int64, ``margin`` in radians. With
    ``keys="sharded"`` centroids are this rank's part and labels still global cluster numbers.
    Returns: 0-D, nats. Gradients: image, centroids, scale; exactly through the margin.
    Memory, communication, raises: as ``similarity_terms``.
    Source: CLIP-CID's cluster loss after UNICOM; ArcFace (Deng et al. 2019). UNICOM's released
    code drops the margin's factor from the gradient.
    """
    who = "cluster_cross_entropy"
    features = inputs.check_features(who, image, centroids, scale)
    return row_loss(
        who, features, labels, hard=1.0, margin=margin, keys=keys, group=group, backend=backend
    )


def logit_kl(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Teachers,
    teacher_text: Teachers,
    teacher_scale: Scale | Sequence[Scale],
    *,
    temperature: float = 1.0,
    keys: str = "replicated",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """Distillation of zero-shot logits over K class texts, with a Hinton temperature t.

    ``t^2 mean_i KL(softmax_k(T_i / t) || softmax_k(Z_i / t))``

    Shapes: image (B, D), text (K, D), teacher_image (B, E), teacher_text (K, E), or tuples.
    Returns: 0-D, nats; sum over classes, mean over rows. Gradients: image, text, scale.
    Memory, communication, raises: as ``similarity_terms``.
    Source: ComKD-CLIP's logit loss after PromptKD, whose code also divides by K.
    """
    if isinstance(teacher_scale, Sequence):
        softened: TeacherScales = [r / temperature for r in teacher_scale]
    else:
        softened = teacher_scale / temperature
    divergence = similarity_loss(
        image,
        text,
        scale / temperature,
        teacher_query=teacher_image,
        teacher_key=teacher_text,
        teacher_scale=softened,
        hard_rows=0.0,
        hard_cols=0.0,
        soft_rows=1.0,
        keys=keys,
        group=group,
        backend=backend,
    )
    return temperature**2 * divergence


def cluster_kl(
    image: Tensor,
    centroids: Tensor,
    scale: Scale,
    teacher_image: Teachers,
    teacher_centroids: Teachers,
    teacher_scale: Scale | Sequence[Scale],
    *,
    temperature: float = 1.0,
    keys: str = "replicated",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """Distillation of soft cluster assignments: ``logit_kl`` with centroids for class texts.

    Shapes: image (B, D), centroids (K, D), teacher_image (B, E), teacher_centroids (K, E); row k
    of both centroid sets is the same cluster. Returns: 0-D, nats.
    Gradients: image, centroids, scale.
    Source: the KL part of CLIP-CID's cluster-level loss.
    """
    return logit_kl(
        image,
        centroids,
        scale,
        teacher_image,
        teacher_centroids,
        teacher_scale,
        temperature=temperature,
        keys=keys,
        group=group,
        backend=backend,
    )


def feature(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """FD of one modality: squared error between student and teacher embeddings.

    ``"mean"``: ``1/(N E) sum_i ||student_i - teacher_i||^2``; ``"sum"``: the same times E, i.e.
    the sum over the width and the mean over rows. The paper's weight 2000 goes with ``"mean"``.

    Shapes: student, teacher (N, E), made unit rows first with ``normalize``.
    Returns: 0-D; float64 if an input is, else float32. Gradients: student; first order only.
    Memory: O(N). Communication: none; the mean over ranks of equal N is the loss.
    Raises: ValueError for unequal shapes, no rows, another reduction, a teacher with a gradient.
    Source: CLIP-KD eq. 11 prints ``"sum"``; its code and tables use ``"mean"``.
    """
    width = _check_feature("feature", student, teacher, reduction)
    distances = feature_op(student, teacher, normalize=normalize, backend=backend)
    return distances.mean() / width


def unit_feature(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """FD of normalised rows, summed over modalities, and these rows for the losses that share them.

    The backward adds up what FD and those losses want and goes through the normalisation once, in
    one launch for all modalities.

    Shapes: students, teachers: a matrix a modality, up to four, all (N, E). Raises: as ``feature``,
    and ValueError for modalities of several shapes.
    Returns: the sum of ``feature`` with ``normalize``, and ``unit_rows`` of each student, (N, E).
    Gradients: students; first order only.
    """
    who, shapes = "unit_feature", {tuple(x.shape) for x in students}
    if len(students) != len(teachers) or len(shapes) != 1:
        raise ValueError(
            f"{who}: expected as many students as teachers, all of one shape; {len(students)} and "
            f"{len(teachers)} came, of the shapes {sorted(shapes)}; call it once for each shape"
        )
    pairs = zip(students, teachers, strict=True)
    width = [_check_feature(who, *pair, reduction) for pair in pairs][0]
    distances, units = unit_feature_op(students, teachers, backend=backend)
    return distances.sum() / (distances.shape[1] * width), units


def _check_feature(who: str, student: Tensor, teacher: Tensor, reduction: str) -> int:
    """Check the arguments; what the distances of rows are divided by."""
    inputs.check_pair(who, "student", student, "teacher", teacher)
    inputs.check_constant(who, teacher=teacher)
    if len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            f"{who}: student and teacher need the same number of rows, at least one; "
            f"{tuple(student.shape)} and {tuple(teacher.shape)} came"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'{who}: reduction is "mean" or "sum"; {reduction!r} came')
    return student.shape[1] if reduction == "mean" else 1
