# SPDX-License-Identifier: Apache-2.0
"""The oracle: every loss of the four papers, dense, obvious and correct in any float dtype.

Beside the losses stand the two numbers that say how alike student and teacher have become,
``mean_cosine`` and ``linear_cka``.

This file is the specification of the engine's mathematics; everything else computes the same
numbers faster. It keeps whole similarity matrices, so use it for tests and benchmarks, in float64.

Conventions. ``scale`` multiplies and is already exponentiated (float, 0-D or [1] tensor). Teacher
inputs are constants: they are detached. Embeddings are L2-normalised by the caller unless the
function has, and is given, ``normalize=True``. Losses are 0-D, in nats, means over the batch.

Shapes: B query rows, M key rows, N pairs (B = M = N), K centroids or classes, D student width,
E teacher width.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = float | Tensor
Teachers = Tensor | Sequence[Tensor] | None


class SimilarityTerms(NamedTuple):
    """The unweighted terms of ``similarity_loss``; soft cross-entropy = soft term + entropy."""

    hard_rows: Tensor
    hard_cols: Tensor
    soft_rows: Tensor
    soft_cols: Tensor
    teacher_entropy_rows: Tensor
    teacher_entropy_cols: Tensor


def similarity_lse(
    query: Tensor, key: Tensor, scale: Scale, exclude: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of every row of the similarity matrix, without one column a row.

    ``lse_i = log sum_{j != exclude_i} exp(scale <query_i, key_j>)``

    Shapes: query (B, D), key (M, D), exclude (B,) int64 column numbers in 0..M-1.
    Returns: (B,), nats; -inf where nothing is left (M = 1).
    Gradients: query, key, scale.
    """
    logits = _logits("similarity_lse", query, key, scale)
    if exclude is not None:
        logits = logits.scatter(1, exclude[:, None], -math.inf)
    return logits.logsumexp(1)


def similarity_terms(
    query: Tensor,
    key: Tensor,
    scale: Scale,
    *,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    teacher_query: Teachers = None,
    teacher_key: Teachers = None,
    teacher_scale: Scale | Sequence[Scale] | None = None,
    hard_rows: bool = True,
    hard_cols: bool = True,
    soft_rows: bool = True,
    soft_cols: bool = True,
    normalize: bool = False,
) -> SimilarityTerms:
    """Hard and soft cross-entropies of a similarity matrix along its rows and its columns.

    With ``Z = scale query key^T``, ``T = teacher_scale teacher_query teacher_key^T``,
    p = softmax(Z) and q = softmax(T) along rows or columns:

    * ``hard_rows = mean_i -log p_i[labels_i]``, ``hard_cols = mean_j -log p_j[col_labels_j]``
    * ``soft_rows = mean_i KL(q_i || p_i)``, ``soft_cols = mean_j KL(q_j || p_j)``
    * ``teacher_entropy = mean H(q)``; several teachers: the mean over teachers of KL and of H.

    Shapes: query (B, D), key (M, D), labels (B,), col_labels (M,), teacher_query (B, E),
    teacher_key (M, E). ``labels`` default to i, ``col_labels`` to j, also when labels are given.
    Teachers may be tuples, of one length, each teacher with its own E.
    Returns: ``SimilarityTerms``; a term that is switched off, or lacks a teacher, is zero.
    Gradients: query, key, scale; none to teachers.
    Raises: ValueError for widths or shapes that do not fit and for defaults that do not exist.
    Source: InfoNCE (Radford et al. 2021); CLIP-KD eq. 4-10; TinyCLIP affinity mimicking.
    """
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = _logits("similarity_terms", query, key, scale)
    teachers = _teacher_logits(logits, teacher_query, teacher_key, teacher_scale, normalize)
    off = logits.new_zeros(())
    kl_rows = [_divergence(logits, t) for t in teachers if soft_rows]
    kl_cols = [_divergence(logits.mT, t.mT) for t in teachers if soft_cols]
    return SimilarityTerms(
        _cross_entropy(logits, _labels(labels, logits, "labels")) if hard_rows else off,
        _cross_entropy(logits.mT, _labels(col_labels, logits.mT, "col_labels"))
        if hard_cols
        else off,
        torch.stack(kl_rows).mean() if kl_rows else off,
        torch.stack(kl_cols).mean() if kl_cols else off,
        torch.stack([_entropy(t) for t in teachers]).mean() if kl_rows else off,
        torch.stack([_entropy(t.mT) for t in teachers]).mean() if kl_cols else off,
    )


def similarity_loss(
    query: Tensor,
    key: Tensor,
    scale: Scale,
    *,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    teacher_query: Teachers = None,
    teacher_key: Teachers = None,
    teacher_scale: Scale | Sequence[Scale] | None = None,
    hard_rows: float = 0.5,
    hard_cols: float = 0.5,
    soft_rows: float = 0.0,
    soft_cols: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """Weighted sum of ``similarity_terms``; a term of weight 0 is not computed.

    Shapes, gradients: as ``similarity_terms``. Returns: 0-D, nats.
    Raises: ValueError, also for a soft weight without a teacher.
    """
    weights = (hard_rows, hard_cols, soft_rows, soft_cols)
    if teacher_query is None and (soft_rows or soft_cols):
        raise ValueError(
            f"similarity_loss: soft_rows={soft_rows} and soft_cols={soft_cols} need a teacher; "
            "none came; give teacher_query, teacher_key and teacher_scale"
        )
    names = ("hard_rows", "hard_cols", "soft_rows", "soft_cols")
    terms = similarity_terms(
        query,
        key,
        scale,
        labels=labels,
        col_labels=col_labels,
        teacher_query=teacher_query,
        teacher_key=teacher_key,
        teacher_scale=teacher_scale,
        normalize=normalize,
        **{name: weight != 0 for name, weight in zip(names, weights, strict=True)},
    )
    weighted = [w * term for w, term in zip(weights, terms[:4], strict=True)]
    return torch.stack(weighted).sum()


def info_nce(image: Tensor, text: Tensor, scale: Scale) -> Tensor:
    """CLIP's contrastive loss: each image names its text and each text its image.

    ``1/2 [CE_mean(Z, i) + CE_mean(Z^T, i)]``, ``Z = scale image text^T``

    Shapes: image, text (N, D). Returns: 0-D, nats. Gradients: image, text, scale.
    Source: CLIP (Radford et al. 2021); the task loss of CLIP-KD.
    """
    return similarity_loss(image, text, scale)


def contrastive_relational(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Teachers,
    teacher_text: Teachers,
    teacher_scale: Scale | Sequence[Scale],
) -> Tensor:
    """CRD, affinity mimicking: the teacher's softmaxes over the batch are the student's targets.

    ``1/2 [mean_i KL(q_i || p_i) + mean_j KL(q_j || p_j)]``, p and q as in ``similarity_terms``

    Shapes: image, text (N, D), teacher_image, teacher_text (N, E), or tuples of them.
    Returns: 0-D, nats; 0 iff the logits agree up to a constant a row and a constant a column.
    Gradients: image, text, scale.
    Source: CLIP-KD eq. 4-10 (there without the 1/2, which its released code has). TinyCLIP's and
    open_clip's soft cross-entropies are this plus the teacher's entropy, with the same gradient.
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
    )


def interactive_contrastive(
    image: Tensor, text: Tensor, scale: Scale, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """ICL: a student anchor finds the teacher's embedding of the other modality.

    ``1/2 [CE_mean(scale image teacher_text^T, i) + CE_mean(scale text teacher_image^T, i)]``

    Shapes: image, text, teacher_image, teacher_text (N, E): the student in the teacher's width.
    Returns: 0-D, nats. Gradients: image, text, scale.
    Source: CLIP-KD eq. 14-16. Its released code multiplies by a raw parameter that starts at
    ln(1/0.07) = 2.66; here scale is the multiplier itself, so either can be given.
    """
    return similarity_loss(
        image, teacher_text.detach(), scale, hard_rows=0.5, hard_cols=0.0
    ) + similarity_loss(text, teacher_image.detach(), scale, hard_rows=0.5, hard_cols=0.0)


def feature(
    student: Tensor, teacher: Tensor, *, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """FD of one modality: squared error between student and teacher embeddings.

    ``"mean"``: ``1/(N E) sum_i ||student_i - teacher_i||^2``; ``"sum"``: the same times E, i.e.
    the sum over the width and the mean over rows. The paper's weight 2000 goes with ``"mean"``.

    Shapes: student, teacher (N, E). Returns: 0-D. Gradients: student.
    Raises: ValueError for unequal shapes or another reduction.
    Source: CLIP-KD eq. 11 prints ``"sum"``; its code and tables use ``"mean"``.
    """
    _same_shape("feature", student=student, teacher=teacher)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'feature: reduction is "mean" or "sum"; {reduction!r} came')
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    squares = (student - teacher.detach()).square()
    return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def info_nce_gradients(image: Tensor, text: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Closed form of the gradients of ``info_nce`` with respect to both embeddings.

    ``G = 1/2 [(P - I) + (Q - I)^T]``, P = rowsoftmax(Z), Q = rowsoftmax(Z^T):
    ``g_image = scale/N G text``, ``g_text = scale/N G^T image``

    Shapes: image, text (N, D). Returns: two (N, D). Gradients: image, text, scale.
    Source: CLIP-KD eq. 19-25, summed over all anchors and with the batch's 1/N.
    """
    logits = _logits("info_nce_gradients", image, text, scale)
    residual = (_softmax_minus_identity(logits) + _softmax_minus_identity(logits.mT).mT) / 2
    rate = scale / len(image)
    return rate * (residual @ text), rate * (residual.mT @ image)


def gradient(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Scale,
) -> Tensor:
    """GD: the student's InfoNCE gradients at its embeddings match the teacher's at its own.

    ``1/(N E) [||g_image - g_image^teacher||^2 + ||g_text - g_text^teacher||^2]``, g by
    ``info_nce_gradients``

    Shapes: image, text, teacher_image, teacher_text (N, E): the student in the teacher's width.
    Returns: 0-D; it falls as 1/N^2 when the batch grows. Gradients: image, text, scale.
    Source: CLIP-KD eq. 13, with mean reduction. Its released code divides cosines by scale (a bug)
    and takes the two directions as four separate errors; see ``kdengine/losses/quirks.py``.
    """
    _same_shape("gradient", image=image, teacher_image=teacher_image)
    student = info_nce_gradients(image, text, scale)
    with torch.no_grad():
        teacher = info_nce_gradients(teacher_image, teacher_text, teacher_scale)
    return F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1], teacher[1])


def augmented_feature(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_fusion: Callable[[Tensor], Tensor],
    text_fusion: Callable[[Tensor], Tensor],
) -> Tensor:
    """AFD: InfoNCE of student and teacher embeddings fused by one learned layer a modality.

    ``info_nce(f(image, teacher_image), f(text, teacher_text), scale)``,
    ``f(x, u) = normalize(fusion([x || u]))``

    Shapes: image, text (N, D), teacher_image, teacher_text (N, E); a fusion maps (N, D + E) to
    (N, any width) and is the caller's, e.g. ``nn.Linear(D + E, D)``. Returns: 0-D, nats.
    Gradients: image, text, scale, and the fusions' parameters.
    Source: CLIP-KD eq. 17.
    """
    fused_image = image_fusion(torch.cat([image, teacher_image.detach()], 1))
    fused_text = text_fusion(torch.cat([text, teacher_text.detach()], 1))
    return info_nce(F.normalize(fused_image, dim=1), F.normalize(fused_text, dim=1), scale)


def cluster_cross_entropy(
    image: Tensor, centroids: Tensor, scale: Scale, labels: Tensor, margin: float = 0.0
) -> Tensor:
    """Cluster discrimination: each image names its cluster, with an additive angular margin.

    ``mean_i -log softmax_k(scale z_ik)[labels_i]``, ``z_ik = cos theta_ik`` but
    ``cos(theta_ik + margin)`` at ``k = labels_i``

    Shapes: image (B, D), centroids (K, D), labels (B,) int64. ``margin`` in radians.
    Returns: 0-D, nats. Gradients: image, centroids, scale; through the margin exactly, i.e. with
    the factor sin(theta + margin) / sin(theta) (cos(margin) where theta is 0 or pi).
    Source: CLIP-CID's cluster loss after UNICOM; ArcFace (Deng et al. 2019). UNICOM's released
    Partial-FC drops that factor from the gradient.
    """
    cosines = _logits("cluster_cross_entropy", image, centroids, 1.0)
    target = cosines.gather(1, labels[:, None])
    # the bound keeps the root's derivative finite at theta = 0, where its gradient is then 0
    sine = (1 - target.square()).clamp(min=torch.finfo(target.dtype).tiny).sqrt()
    shifted = target * math.cos(margin) - sine * math.sin(margin)
    return _cross_entropy(scale * cosines.scatter(1, labels[:, None], shifted), labels)


def logit_kl(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Scale,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Distillation of zero-shot logits over K class texts, with a Hinton temperature t.

    ``t^2 mean_i KL(softmax_k(T_i / t) || softmax_k(Z_i / t))``, Z and T as in ``similarity_terms``

    Shapes: image (B, D), text (K, D), teacher_image (B, E), teacher_text (K, E).
    Returns: 0-D, nats; sum over classes, mean over rows. Gradients: image, text, scale.
    Source: ComKD-CLIP's logit loss after PromptKD, whose code also divides by K and then weighs
    with 1000, i.e. gives this loss the weight 1000/K.
    """
    divergence = similarity_loss(
        image,
        text,
        scale / temperature,
        teacher_query=teacher_image,
        teacher_key=teacher_text,
        teacher_scale=teacher_scale / temperature,
        hard_rows=0.0,
        hard_cols=0.0,
        soft_rows=1.0,
    )
    return temperature**2 * divergence


def cluster_kl(
    image: Tensor,
    centroids: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_centroids: Tensor,
    teacher_scale: Scale,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Distillation of soft cluster assignments: ``logit_kl`` with centroids for class texts.

    Shapes: image (B, D), centroids (K, D), teacher_image (B, E), teacher_centroids (K, E); row k
    of both centroid sets is the same cluster. Returns: 0-D, nats.
    Gradients: image, centroids, scale.
    Source: the KL part of CLIP-CID's cluster-level loss.
    """
    teacher = (teacher_image, teacher_centroids, teacher_scale)
    return logit_kl(image, centroids, scale, *teacher, temperature=temperature)


def moment_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """IFAlign: the batch's mean and variance of every feature dimension match the teacher's.

    ``1/E sum_d |mean_d - mean_d^teacher| + 1/E sum_d |var_d - var_d^teacher|``, biased variance

    Shapes: student, teacher (N, E). Returns: 0-D; unchanged when either batch is permuted.
    Gradients: student.
    Raises: ValueError for unequal shapes.
    Source: ComKD-CLIP's feature alignment, with PromptAlign's mean over dimensions.
    """
    _same_shape("moment_alignment", student=student, teacher=teacher)
    teacher = teacher.detach()
    means = (student.mean(0) - teacher.mean(0)).abs().mean()
    return means + (student.var(0, correction=0) - teacher.var(0, correction=0)).abs().mean()


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """How far student and teacher point the same way: the mean cosine of corresponding rows.

    ``1/N sum_i <student_i, teacher_i> / (||student_i|| ||teacher_i||)``

    Shapes: student, teacher (N, E), of any length. Returns: 0-D, from -1 to 1.
    Raises: ValueError for unequal shapes.
    Source: CLIP-KD Fig. 3.
    """
    _same_shape("mean_cosine", student=student, teacher=teacher)
    return (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(1).mean()


def linear_cka(student: Tensor, teacher: Tensor, *, debiased: bool = True) -> Tensor:
    """Whether student and teacher arrange a batch alike, whatever the widths and the rotation.

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``, K = X X^T, L = Y Y^T, of centred columns (which
    the debiased form does not need), with

    * biased: ``HSIC(K, L) = tr(K L)``; near 1 for anything when N << D, E
    * debiased: of K and L with zero diagonals, up to a factor that cancels,
      ``tr(K L) + 1^T K 1 1^T L 1 / ((N-1) (N-2)) - 2/(N-2) 1^T K L 1``; about 0 when independent

    Shapes: student X (N, D), teacher Y (N, E). Unchanged by rotations, scales and shifts of either.
    Returns: 0-D; 1 for equal arrangements; nan if N < 4 (debiased) or all rows of one are equal.
    Source: Kornblith et al. 2019; unbiased HSIC: Song et al. 2012, as in Nguyen et al. 2021.
    """
    num = len(student)
    k, ell = ((x - x.mean(0)) @ (x - x.mean(0)).mT for x in (student, teacher))
    if debiased and num < 4:
        return student.new_full((), math.nan)
    if debiased:
        k, ell = (gram - gram.diag().diag() for gram in (k, ell))

    def hsic(k: Tensor, ell: Tensor) -> Tensor:
        if not debiased:
            return (k * ell).sum()
        sums = k.sum() * ell.sum() / ((num - 1) * (num - 2))
        return (k * ell).sum() + sums - 2 / (num - 2) * (k.sum(0) @ ell.sum(0))

    return hsic(k, ell) / (hsic(k, k) * hsic(ell, ell)).sqrt()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "contrastive_relational": contrastive_relational,
    "interactive_contrastive": interactive_contrastive,
    "feature": feature,
    "gradient": gradient,
    "augmented_feature": augmented_feature,
    "cluster_cross_entropy": cluster_cross_entropy,
    "cluster_kl": cluster_kl,
    "logit_kl": logit_kl,
    "moment_alignment": moment_alignment,
}


def _logits(who: str, query: Tensor, key: Tensor, scale: Scale) -> Tensor:
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{who}: query and key are rows of the same width; {tuple(query.shape)} and "
            f"{tuple(key.shape)} came. Did you forget the projection head?"
        )
    return scale * (query @ key.mT)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # log(1 + exp(others - target)), not lse - target: a confident row keeps its relative accuracy
    target = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    return -F.logsigmoid(target - others).mean()


def _divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    # log_softmax of finite logits is finite, so an underflowing target contributes exactly 0
    log_q = teacher_logits.log_softmax(1)
    return (log_q.exp() * (log_q - logits.log_softmax(1))).sum(1).mean()


def _entropy(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(1)
    return -(log_q.exp() * log_q).sum(1).mean()


def _softmax_minus_identity(logits: Tensor) -> Tensor:
    # the diagonal is minus the mass of the others, which p_ii - 1 would lose for confident rows
    others = logits.softmax(1) * (1 - torch.eye(*logits.shape).to(logits))
    return others - torch.diag(others.sum(1))


def _labels(labels: Tensor | None, logits: Tensor, name: str) -> Tensor:
    rows, cols = logits.shape
    if labels is None and rows > cols:
        raise ValueError(
            f"similarity_terms: without {name}, number i of {rows} has positive i; there are only "
            f"{cols}; give {name} or switch its term off"
        )
    if labels is not None and labels.shape != (rows,):
        raise ValueError(
            f"similarity_terms: {name} needs one number for each of {rows}; shape "
            f"{tuple(labels.shape)} came"
        )
    return torch.arange(rows, device=logits.device) if labels is None else labels


def _teacher_logits(
    logits: Tensor,
    query: Teachers,
    key: Teachers,
    scale: Scale | Sequence[Scale] | None,
    normalize: bool,
) -> list[Tensor]:
    parts = [x if isinstance(x, Sequence) else (x,) for x in (query, key, scale)]
    if query is None and key is None and scale is None:
        return []
    if any(x is None for part in parts for x in part) or len({len(part) for part in parts}) != 1:
        raise ValueError(
            "similarity_terms: teacher_query, teacher_key and teacher_scale come together, one "
            f"each or tuples of one length; {[len([x for x in p if x is not None]) for p in parts]}"
            " came"
        )
    all_logits = []
    for u, v, r in zip(*parts, strict=True):
        if normalize:
            u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
        teacher_logits = _logits("similarity_terms (teacher)", u, v, r).detach()
        _same_shape("similarity_terms", logits=logits, teacher_logits=teacher_logits)
        all_logits.append(teacher_logits)
    return all_logits


def _same_shape(who: str, **tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(
            f"{who}: {' and '.join(shapes)} need one shape; {shapes} came. Did you forget the "
            "projection head?"
        )
