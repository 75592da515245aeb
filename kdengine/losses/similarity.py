# SPDX-License-Identifier: Apache-2.0
"""The relational losses: arithmetic on the statistics of one similarity matrix.

``similarity_terms`` is the primitive, ``similarity_loss`` its weighted sum, ``similarity_lse`` the
piece from which other softmaxes are built. None of them stores a matrix of rows x columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Scale, Teachers, TeacherScales
from kdengine.losses.rows import row_loss, row_statistics
from kdengine.losses.sweep import sweep
from kdengine.losses.terms import all_terms


class SimilarityTerms(NamedTuple):
    """The unweighted terms of ``similarity_loss``; soft cross-entropy = soft term + entropy."""

    hard_rows: Tensor
    hard_cols: Tensor
    soft_rows: Tensor
    soft_cols: Tensor
    teacher_entropy_rows: Tensor
    teacher_entropy_cols: Tensor


def similarity_loss(
    query: Tensor,
    key: Tensor,
    scale: Scale,
    *,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    teacher_query: Teachers = None,
    teacher_key: Teachers = None,
    teacher_scale: TeacherScales = None,
    hard_rows: float = 0.5,
    hard_cols: float = 0.5,
    soft_rows: float = 0.0,
    soft_cols: float = 0.0,
    normalize: bool = False,
    keys: str = "gathered",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of ``similarity_terms``; a term of weight 0 is not computed.

    ``hard_rows * mean_i CE(p_i, labels_i) + hard_cols * mean_j CE(p_j, col_labels_j)
    + soft_rows * mean_i KL(q_i || p_i) + soft_cols * mean_j KL(q_j || p_j)``

    Shapes, gradients, communication: as ``similarity_terms``.
    Returns: 0-D, nats; float64 if a feature is, else float32.
    Memory: as ``similarity_terms``; of rows alone also the gradients of query and key in float32,
    which its forward makes where that costs fewer products (``row_loss``).
    Raises: as ``similarity_terms``; ValueError for a soft weight without a teacher.
    Source: InfoNCE (Radford et al. 2021); CLIP-KD eq. 4-10; TinyCLIP, CLIP-CID, ComKD-CLIP.
    """
    weights = (hard_rows, hard_cols, soft_rows, soft_cols)
    for weight in weights:
        if not isinstance(weight, int | float):
            raise TypeError(
                f"similarity_loss: a weight is a float; {type(weight).__name__} came; weigh the "
                "terms of similarity_terms with tensors"
            )
    if teacher_query is None and (soft_rows or soft_cols):
        raise ValueError(
            f"similarity_loss: soft_rows={soft_rows} and soft_cols={soft_cols} need a teacher; "
            "none came; give teacher_query, teacher_key and teacher_scale"
        )
    if (hard_rows or soft_rows) and not (hard_cols or soft_cols):
        who = "similarity_loss"
        teachers = teacher_query, teacher_key, teacher_scale
        features = inputs.check_features(who, query, key, scale, *teachers, normalize)
        if col_labels is not None:
            num_rows = Exchange.over(group).world_size * len(query)
            inputs.check_labels(who, "col_labels", col_labels, len(key), num_rows)
        return row_loss(
            who,
            features,
            labels,
            hard=hard_rows,
            soft=soft_rows,
            keys=keys,
            group=group,
            backend=backend,
        )
    terms = similarity_terms(
        query,
        key,
        scale,
        labels=labels,
        col_labels=col_labels,
        teacher_query=teacher_query,
        teacher_key=teacher_key,
        teacher_scale=teacher_scale,
        hard_rows=hard_rows != 0,
        hard_cols=hard_cols != 0,
        soft_rows=soft_rows != 0,
        soft_cols=soft_cols != 0,
        normalize=normalize,
        keys=keys,
        group=group,
        backend=backend,
    )
    total = torch.zeros_like(terms.hard_rows)
    for weight, term in zip(weights, terms, strict=False):
        # a switched off term is a zero outside the graph
        if weight != 0:
            total = torch.add(total, term, alpha=weight)
    return total


def similarity_terms(
    query: Tensor,
    key: Tensor,
    scale: Scale,
    *,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    teacher_query: Teachers = None,
    teacher_key: Teachers = None,
    teacher_scale: TeacherScales = None,
    hard_rows: bool = True,
    hard_cols: bool = True,
    soft_rows: bool = True,
    soft_cols: bool = True,
    normalize: bool = False,
    keys: str = "gathered",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> SimilarityTerms:
    """Hard and soft cross-entropies of a similarity matrix along rows and columns, in one sweep.

    With ``Z = scale query key^T``, ``T = teacher_scale teacher_query teacher_key^T``,
    p = softmax(Z) and q = softmax(T) along rows or columns:

    * ``hard_rows = mean_i -log p_i[labels_i]``, ``hard_cols = mean_j -log p_j[col_labels_j]``
    * ``soft_rows = mean_i KL(q_i || p_i)``, ``soft_cols = mean_j KL(q_j || p_j)``
    * ``teacher_entropy = mean H(q)``, detached

    Shapes: query (B, D), key (M, D), L2-normalised rows unless ``normalize``; ``scale`` a float,
    0-D or [1] tensor; labels (B,) and col_labels (M,) int64, by default i and j; teacher_query
    (B, E), teacher_key (M, E), or tuples for K teachers, of which soft terms take the mean over k
    of KL(q_k || p).
    Returns: ``SimilarityTerms``, 0-D, nats; float64 if a feature is, else float32. A term that is
    switched off, or that lacks a teacher, is not computed and is zero.
    Gradients: query, key (skipped for a constant key), scale; each term may get its own upstream
    gradient. First order only. Teachers are constants.
    Memory: O(B + M) statistics and a few strips of rows, forward and backward; never B x M.
    Communication: see ``sweep``. With a group, B and M are this rank's, label numbers are global,
    and each rank gets the terms of its own rows and its own columns; their mean over ranks is the
    loss, and feature gradients are W times its gradient, for an averaging optimiser. ``keys``:
    ``gathered`` (key rows are spread over the ranks like the batch), ``replicated`` (the same on
    every rank, which then all return the whole column terms), ``sharded`` (class-parallel: each
    rank holds some columns; their gradient is the loss's own, not to be averaged).
    Raises: ValueError or TypeError for shapes, dtypes, labels and names that do not fit, for an
    empty batch and for B that differs between ranks (on every rank); RuntimeError for a backend
    that cannot run and under ``create_graph=True``.
    """
    who = "similarity_terms"
    features = inputs.check_features(
        who, query, key, scale, teacher_query, teacher_key, teacher_scale, normalize
    )
    has_teacher = len(features.teacher_query) > 0
    hard, soft = (hard_rows, hard_cols), (soft_rows and has_teacher, soft_cols and has_teacher)
    rows, cols = sweep(
        who,
        features,
        labels,
        col_labels,
        hard=hard,
        soft=soft,
        keys=keys,
        group=group,
        backend=backend,
    )
    off = features.query.new_zeros((), dtype=features.dtype)
    return SimilarityTerms(*all_terms(rows, cols, hard, soft, off, backend))


def similarity_lse(
    query: Tensor,
    key: Tensor,
    scale: Scale,
    *,
    exclude: Tensor | None = None,
    normalize: bool = False,
    keys: str = "gathered",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """Log-sum-exp of every row of the similarity matrix, without column ``exclude[i]``.

    ``lse_i = log sum_{j != exclude_i} exp(scale <query_i, key_j>)``

    Other softmaxes follow: ``softplus(lse - z_label)`` is a cross-entropy (with
    ``z_label = scale cos(theta + m)`` one with a margin), ``lse - sum q z`` one with sparse soft
    targets or several positives.

    Shapes: query (B, D), key (M, D), exclude (B,) int64 global column numbers.
    Returns: (B,), nats; float64 if a feature is, else float32; -inf where nothing is left.
    Gradients, memory, communication, raises: as ``similarity_terms``.
    """
    who = "similarity_lse"
    features = inputs.check_features(who, query, key, scale, normalize=normalize)
    return row_statistics(who, features, exclude, keys=keys, group=group, backend=backend).others
