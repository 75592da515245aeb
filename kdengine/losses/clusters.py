# SPDX-License-Identifier: Apache-2.0
"""CLIP-CID's losses of images and clusters, from one sweep: ``cluster_terms``."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Features, Scale
from kdengine.losses.layout import Layout, lay_out
from kdengine.losses.rows import row_loss
from kdengine.losses.sweep import check_row_labels, eager_over_ranks, reduced_rows
from kdengine.losses.terms import hard_term, soft_terms
from kdengine.ops import similarity_rest
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
    numbers in a row, the label first, probabilities (B, m), teacher_image (B, E),
    teacher_centroids (K, E); ``margin`` in radians. With ``keys="sharded"`` centroids are this
    rank's part, whatever its size, and all numbers are global.
    Returns: ``ClusterTerms``, 0-D, nats; float64 if a feature is, else float32.
    Gradients: image, centroids, scale; exactly through the margin. First order only.
    Memory: as ``similarity_terms``; with ``nearest`` sharded (N, D) and (N, m) numbers of the N
    rows of all ranks. Work: with ``nearest`` see ``ops.similarity_rest``, whose only backend is
    ``torch``; a second sweep where the temperature is not 1.
    Communication: as ``similarity_terms``; with ``nearest`` sharded an all-gather of images and
    numbers and an all-to-all of (N, m), and the same ways back.
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
    cooled = features._replace(
        scale=features.scale / temperature, teacher_scale=features.teacher_scale / temperature
    )
    shared = temperature == 1.0
    sparse, dense = probabilities is not None, len(features.teacher_query) > 0
    first = second = torch.zeros((), dtype=features.dtype, device=features.query.device)
    rows = named = None
    if nearest is not None:
        _check_nearest(who, at, nearest, labels)
        if discrimination or (sparse and shared):
            named = _look(at, features, nearest, backend)
        if sparse:
            assert probabilities is not None
            soft = named if named and shared else _look(at, cooled, nearest, backend)
            second = soft.divergence(probabilities)
    if (discrimination and not named) or (dense and shared):
        rows = reduced_rows(at, features, labels, soft=dense and shared, backend=backend)
    if discrimination and named:
        first = named.discrimination(features.scale, margin, num_positives)
    elif discrimination and rows:
        target, _ = with_margin(rows.statistics.positive, features.scale, margin)
        shifted = rows._replace(statistics=rows.statistics._replace(positive=target))
        first = hard_term(shifted, rows.has_positive())
    if dense:
        if not shared:
            rows = reduced_rows(at, cooled, labels, soft=True, backend=backend)
        assert rows is not None
        second, _ = soft_terms(rows, rows.has_positive())
    return ClusterTerms(first, temperature**2 * second)


class _Named(NamedTuple):
    """Rows of which m logits (b, m) are known, the first of them its cluster's, and the rest (b,).

    Everything follows by adding up: nothing is taken off a sum, which would lose a small rest. A
    rest of nothing is the lowest number there is, and not infinite, whose gradients are none.
    """

    logits: Tensor
    rest: Tensor

    def without(self, count: int) -> Tensor:
        """Log-sum-exp of every row without its first named columns."""
        return torch.cat([self.rest[:, None], self.logits[:, count:]], 1).logsumexp(1)

    def discrimination(self, scale: Tensor, margin: float, num_positives: int) -> Tensor:
        """The mean loss of naming one's cluster, or clusters."""
        if num_positives == 1:
            target, _ = with_margin(self.logits[:, 0], scale, margin)
            return -F.logsigmoid(target - self.without(1)).mean()
        pull = (-self.logits[:, :num_positives]).logsumexp(1)
        push = self.without(num_positives)
        return -(F.logsigmoid(-pull) + F.logsigmoid(-push)).mean()

    def divergence(self, probabilities: Tensor) -> Tensor:
        """The mean KL over the named columns and the rest as one, relative to the positives."""
        positive = self.logits[:, 0]
        q = probabilities.detach().to(positive.dtype)
        # minus the log-probability of the positive
        loss = -F.logsigmoid(positive - self.without(1))
        loss = loss + (torch.xlogy(q, q) - q * (self.logits - positive[:, None])).sum(1)
        # where nothing is left, nothing is expected there
        something = self.rest > torch.finfo(self.rest.dtype).min / 2
        tail = torch.where(something, (1 - q.sum(1)).clamp(min=0), 0)
        return (loss + torch.xlogy(tail, tail) - tail * (self.rest - positive)).mean()


def _look(at: Layout, features: Features, nearest: Tensor, backend: str) -> _Named:
    """The named logits of this rank's rows, and the rest, whoever holds their columns.

    Communication, sharded: all-gather of the numbers and the images, all-to-all of the results;
    backward the same ways back.
    """
    query, key, scale = features[:3]
    lowest = torch.finfo(features.dtype).min
    if at.num_ranks == 1 or at.keys != "sharded":
        rest, logits = similarity_rest(query, key, scale, nearest, backend=backend)
        return _Named(logits, rest.clamp(min=lowest))
    group = at.exchange.group
    everyone = distributed.gather_rows(query, group)
    numbers = distributed.gather_constant(nearest, group, "numbers of clusters")
    # nothing averages a shard's gradient over ranks, so it is that of the mean already
    shard = distributed.scale_gradient(key, 1 / at.num_ranks)
    rest, logits = similarity_rest(everyone, shard, scale, numbers - at.first_col, backend=backend)
    parts = torch.cat([rest[:, None], logits], 1).unflatten(0, (at.num_ranks, -1))
    parts = distributed.all_to_all(parts, group)
    # at most one part has a named column; the others say 0
    return _Named(parts[:, :, 1:].sum(0), parts[:, :, 0].clamp(min=lowest).logsumexp(0))


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


def _check_nearest(who: str, at: Layout, nearest: Tensor, labels: Tensor) -> None:
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
    if nearest.device.type == "cpu" and not torch.equal(nearest[:, 0], labels):
        raise ValueError(
            f"{who}: the first column of nearest is the label; other numbers came as labels"
        )
