# SPDX-License-Identifier: Apache-2.0
"""CLIP-CID's losses of images and clusters, from one sweep: ``cluster_terms``."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Features, Scale
from kdengine.losses.layout import Layout, lay_out
from kdengine.losses.picked import picked_cosines
from kdengine.losses.rows import row_loss
from kdengine.losses.sweep import Reduced, check_row_labels, eager_over_ranks, reduced_rows
from kdengine.losses.terms import hard_term, soft_terms
from kdengine.ops.row_terms import with_margin


class ClusterTerms(NamedTuple):
    """The unweighted terms; what was not asked for is zero."""

    discrimination: Tensor
    divergence: Tensor


def cluster_terms(
    image: Tensor,
    centroids: Tensor,
    scale: Scale,
    labels: Tensor,
    *,
    margin: float = 0.0,
    num_positives: int = 1,
    nearest: Tensor | None = None,
    probabilities: Tensor | None = None,
    teacher_image: Tensor | None = None,
    teacher_centroids: Tensor | None = None,
    teacher_scale: Scale | None = None,
    temperature: float = 1.0,
    discrimination: bool = True,
    keys: str = "replicated",
    group: Group | Exchange = None,
    backend: str = "auto",
) -> ClusterTerms:
    """Cluster discrimination, and the KL of soft cluster assignments, of one sweep over clusters.

    With z = scale image centroids^T and p = softmax(z / t):

    * ``discrimination``: ``cluster_cross_entropy`` with the margin; with several positives, the
      first l columns of ``nearest``, MLCD's ``mean_i [log(1 + sum_{p in P_i} exp(-z_ip)) +
      log(1 + sum_{n not in P_i} exp(z_in))]``
    * ``divergence``, with ``probabilities`` q of the ``nearest``: ``t^2 mean_i KL`` over these m
      columns and all others as one (``reference_clusters.sparse_cluster_kl``): at most the KL over
      all, equal to it where student and teacher share the rest out alike
    * ``divergence``, with a teacher: ``cluster_kl``, exact, for one product more

    Shapes: image (B, D), centroids (K, D), labels (B,) int64, nearest (B, m) int64, different
    numbers in a row, labels best among them, probabilities (B, m), teacher_image (B, E),
    teacher_centroids (K, E); ``margin`` in radians. With ``keys="sharded"`` centroids are this
    rank's part, whatever its size, and all numbers are global.
    Returns: ``ClusterTerms``, 0-D, nats; float64 if a feature is, else float32.
    Gradients: image, centroids, scale; exactly through the margin. First order only.
    Memory: as ``similarity_terms``; (N, m) numbers for the N rows of all ranks. Work: a second
    sweep where the temperature is not 1.
    Communication: as ``similarity_terms``; with ``nearest`` sharded see ``picked_cosines``.
    Raises: as ``similarity_terms``; ValueError for options that exclude each other.
    Source: CLIP-CID (Yang et al., AAAI-25), which has a softmax loss and a KL over clusters
    (attested at second hand; their form is a reconstruction), UNICOM, MLCD, ArcFace.
    """
    who = "cluster_terms"
    _check(who, nearest, probabilities, teacher_image, margin, num_positives)
    features = inputs.check_features(
        who, image, centroids, scale, teacher_image, teacher_centroids, teacher_scale
    )
    return _cluster_terms(
        who,
        features,
        labels,
        nearest,
        probabilities,
        margin=margin,
        num_positives=num_positives,
        temperature=temperature,
        discrimination=discrimination,
        keys=keys,
        group=group,
        backend=backend,
    )


@eager_over_ranks
def _cluster_terms(
    who: str,
    features: Features,
    labels: Tensor,
    nearest: Tensor | None,
    probabilities: Tensor | None,
    *,
    margin: float,
    num_positives: int,
    temperature: float,
    discrimination: bool,
    keys: str,
    group: Exchange,
    backend: str,
) -> ClusterTerms:
    if discrimination and nearest is None and not features.teacher_query:
        loss = row_loss(
            who,
            features,
            labels,
            hard=1.0,
            margin=margin,
            keys=keys,
            group=group,
            backend=backend,
        )
        return ClusterTerms(loss, torch.zeros_like(loss.detach()))
    at = lay_out(who, features, keys, group, (True, nearest is not None))
    check_row_labels(who, at, labels, True)
    dense = len(features.teacher_query) > 0
    soft, shared = dense or probabilities is not None, temperature == 1.0
    named = None
    if nearest is not None:
        _check_nearest(who, at, nearest)
        named = _Named(nearest, picked_cosines(at, features.query, features.key, nearest))
    cooled = features._replace(
        scale=features.scale / temperature, teacher_scale=features.teacher_scale / temperature
    )
    first = second = torch.zeros((), dtype=features.dtype, device=features.query.device)
    rows = reduced_rows(at, features, labels, soft=dense and shared, backend=backend)
    if discrimination:
        first = _discrimination(rows, features.scale, named, margin, num_positives)
    if soft:
        if not shared:
            rows = reduced_rows(at, cooled, labels, soft=dense, backend=backend)
        if dense:
            second, _ = soft_terms(rows, rows.has_positive())
        else:
            assert named is not None and probabilities is not None
            second = _bucketed(rows, cooled.scale, named, probabilities)
    return ClusterTerms(first, temperature**2 * second)


class _Named(NamedTuple):
    """Columns of each row, (b, m), and their cosines."""

    columns: Tensor
    cosines: Tensor

    def first(self, count: int) -> "_Named":
        return _Named(self.columns[:, :count], self.cosines[:, :count])


def _discrimination(
    rows: Reduced, scale: Tensor, named: _Named | None, margin: float, num_positives: int
) -> Tensor:
    """The mean loss of naming one's cluster, or clusters."""
    stats = rows.statistics
    if num_positives == 1:
        target, _ = with_margin(stats.positive, scale, margin)
        rows = rows._replace(statistics=stats._replace(positive=target))
        return hard_term(rows, rows.has_positive())
    assert named is not None
    positives = named.first(num_positives)
    pull = (-scale * positives.cosines).logsumexp(1)
    loss = -F.logsigmoid(-pull)
    if (rest := _rest(rows, scale, positives)) is not None:
        loss = loss - F.logsigmoid(-rest)
    return rows.mean(loss)


def _bucketed(rows: Reduced, scale: Tensor, named: _Named, probabilities: Tensor) -> Tensor:
    """The mean KL over some columns and the rest as one, relative to the positives."""
    positive = rows.statistics.positive
    q = probabilities.detach().to(positive.dtype)
    ratios = scale * named.cosines - positive[:, None]
    # minus the log-probability of the positive
    loss = -F.logsigmoid(positive - rows.statistics.others)
    loss = loss + (torch.xlogy(q, q) - q * ratios).sum(1)
    if (rest := _rest(rows, scale, named)) is not None:
        tail = (1 - q.sum(1)).clamp(min=0)
        loss = loss + torch.xlogy(tail, tail) - tail * (rest - positive)
    return rows.mean(loss)


def _rest(rows: Reduced, scale: Tensor, named: _Named) -> Tensor | None:
    """Log-sum-exp of every row without the named columns; None where those are all.

    The label's column, which may hold nearly all of a row, is left out by the sweep itself; the
    others are taken off the sum, which loses digits only where they are nearly all of the rest.
    """
    if named.columns.shape[1] == rows.limit:
        return None
    stats = rows.statistics
    is_label = named.columns == rows.labels[:, None]
    z = scale * named.cosines
    # not infinite: the gradient of what is left out is 0
    taken = z.masked_fill(is_label, torch.finfo(z.dtype).min / 2).logsumexp(1)
    whole = torch.logaddexp(stats.others, stats.positive)
    whole = torch.where(is_label.any(1), stats.others, whole)
    share = (taken - whole).clamp(max=-torch.finfo(z.dtype).eps)
    return whole + _log_of_rest(share)


def _log_of_rest(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of x < 0."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def _check(
    who: str,
    nearest: Tensor | None,
    probabilities: Tensor | None,
    teacher_image: Tensor | None,
    margin: float,
    num_positives: int,
) -> None:
    """Refuse options that do not fit each other."""
    count = 0 if nearest is None else nearest.shape[-1]
    if num_positives < 1 or (num_positives > 1 and num_positives > count):
        raise ValueError(
            f"{who}: several positives are the first columns of nearest; num_positives="
            f"{num_positives} came with {count} columns"
        )
    if num_positives > 1 and margin:
        raise ValueError(
            f"{who}: a margin is for one positive; margin={margin} and num_positives="
            f"{num_positives} came"
        )
    if probabilities is None:
        return
    if teacher_image is not None:
        raise ValueError(
            f"{who}: the targets are probabilities or a teacher's; both came; leave one away"
        )
    if nearest is None or probabilities.shape != nearest.shape:
        shape = None if nearest is None else tuple(nearest.shape)
        raise ValueError(
            f"{who}: probabilities belong to the columns of nearest, {shape}; shape "
            f"{tuple(probabilities.shape)} came"
        )
    inputs.check_constant(who, probabilities=probabilities)


def _check_nearest(who: str, at: Layout, nearest: Tensor) -> None:
    if nearest.dtype != torch.int64 or nearest.ndim != 2 or not nearest.shape[1]:
        raise TypeError(
            f"{who}: nearest needs to be int64 numbers of columns, (rows, m); {nearest.dtype} "
            f"{tuple(nearest.shape)} came"
        )
    if nearest.shape[1] > at.total_cols:
        raise ValueError(
            f"{who}: nearest names different columns, of which there are {at.total_cols}; "
            f"{nearest.shape[1]} came for each row"
        )
    flat = nearest.flatten()
    inputs.check_labels(who, "nearest", flat, at.num_rows * nearest.shape[1], at.total_cols)
