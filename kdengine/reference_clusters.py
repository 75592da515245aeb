# SPDX-License-Identifier: Apache-2.0
"""The oracle of losses over clusters that know some of the centroids of each image by number.

Dense, in any float dtype; ``kdengine.reference`` has the cluster losses that name one centroid, or
all of them. Shapes: B images, K centroids, D width, m or l of the K for each image.
"""

import torch
from torch import Tensor


def sparse_cluster_kl(
    image: Tensor,
    centroids: Tensor,
    scale: float | Tensor,
    nearest: Tensor,
    probabilities: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL(q || p) over m centroids of each image by number, and all others as one.

    ``t^2 mean_i [sum_{k in near_i} q_ik log(q_ik / p_ik) + r_i log(r_i / (1 - sum p_ik))]``,
    p = softmax(scale image centroids^T / t), r_i = 1 - sum q_ik

    At most the KL over all K, and equal to it where p and q share the rest out alike.

    Shapes: image (B, D), centroids (K, D), nearest (B, m) int64, different numbers in a row,
    probabilities (B, m), constants whose sum is at most 1.
    Returns: 0-D, nats. Gradients: image, centroids, scale.
    Source: reconstruction; CLIP-CID's cluster distillation is a KL (attested at second hand).
    """
    p = (scale / temperature * image @ centroids.T).softmax(1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, nearest, True)
    q = probabilities.detach().to(p.dtype)
    # the rest as the sum of what it is made of: 1 - sum would cancel
    rest = torch.where(inside, 0, p).sum(1, keepdim=True)
    both = torch.cat([p.gather(1, nearest), rest], 1)
    # where nothing is left, nothing is expected there
    left = torch.where(rest > 0, (1 - q.sum(1, keepdim=True)).clamp(min=0), 0)
    target = torch.cat([q, left], 1)
    terms = torch.xlogy(target, target) - torch.xlogy(target, both)
    return temperature**2 * terms.sum(1).mean()


def multi_positive(
    image: Tensor, centroids: Tensor, scale: float | Tensor, positives: Tensor
) -> Tensor:
    """Cluster discrimination with several positives for an image.

    ``mean_i [log(1 + sum_{p in P_i} exp(-z_ip)) + log(1 + sum_{n not in P_i} exp(z_in))]``,
    z = scale image centroids^T

    Shapes: image (B, D), centroids (K, D), positives (B, l) int64, different numbers in a row.
    Returns: 0-D, nats. Gradients: image, centroids, scale.
    Source: MLCD (An et al. 2024, arXiv 2407.17331), of CLIP-CID's team one month earlier; whether
    CLIP-CID has several positives is not known.
    """
    z = scale * image @ centroids.T
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(1, positives, True)
    zero = z.new_zeros(len(z), 1)
    pull = torch.cat([zero, torch.where(inside, -z, -torch.inf)], 1).logsumexp(1)
    push = torch.cat([zero, torch.where(inside, -torch.inf, z)], 1).logsumexp(1)
    return (pull + push).mean()
