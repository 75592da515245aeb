# SPDX-License-Identifier: Apache-2.0
"""The oracle of the op ``assign``: whole distance matrices, by differences, in any float dtype.

Shapes: N rows, K keys (centroids, or other rows), D width.
"""

from torch import Tensor


def squared_distances(x: Tensor, key: Tensor) -> Tensor:
    """``||x_i - key_j||^2``, of differences: exact where rows are close.

    Shapes: x (N, D), key (K, D). Returns: (N, K).
    """
    return (x[:, None] - key[None]).square().sum(2)


def nearest(x: Tensor, key: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest keys of every row, nearest first; of equally near ones the first.

    Shapes: x (N, D), key (K, D), count <= K.
    Returns: their numbers (N, count) int64, and squared distances (N, count).
    Source: k-means' assignment, of unit rows ``argmax_k <x_i, key_k>``; CLIP-CID gives each image
    the label of its nearest centroid (attested at second hand), top-l are MLCD's positives.
    """
    distances, order = squared_distances(x, key).sort(dim=1, stable=True)
    return order[:, :count], distances[:, :count]


def nearest_of_softmax(
    x: Tensor, key: Tensor, scale: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` most probable keys of unit rows under a softmax over all unit keys.

    ``q_ij = exp(scale cosine_ij - lse_i)``, and ``1 - sum_j q_ij`` is the mass of the others.

    Shapes: x (N, D), key (K, D), count <= K.
    Returns: their numbers (N, count) int64, nearest first, their cosines (N, count), and the
    log-sum-exp of ``scale <x_i, key_k>`` over all keys (N,).
    Source: CLIP-CID's teacher distribution over clusters (attested at second hand).
    """
    cosine = x @ key.mT
    index = nearest(x, key, count)[0]
    return index, cosine.gather(1, index), (scale * cosine).logsumexp(1)


def range_join(x: Tensor, y: Tensor | None = None, *, eps: float) -> Tensor:
    """Pairs closer than ``eps``: of x with y, or without y those i < j within x.

    Shapes: x (N, D), y (M, D). Returns: (E, 2) int64, (i, j) in ascending order.
    Source: CLIP-CID's image semantic balance joins images by Euclidean distance (attested at
    second hand); its eps is not known.
    """
    near = squared_distances(x, x if y is None else y).sqrt() < eps
    return (near.triu(1) if y is None else near).nonzero()
