# SPDX-License-Identifier: Apache-2.0
"""What a teacher says of each row: its nearest centroids, under the softmax over all of them.

    cosine_ij = <x_i, c_j>,   lse_i = log sum_k exp(scale cosine_ik), over all K centroids
    q_ij = exp(scale cosine_ij - lse_i),   mass of all others = 1 - sum_j q_ij, over the nearest

    OUT/shards/SHARD-DIGEST/nearest.npy   int32 [n, m], the m nearest centroids, nearest first
    OUT/shards/SHARD-DIGEST/cosines.npy   float32 [n, m], of each
    OUT/shards/SHARD-DIGEST/lse.npy       float32 [n], nats

Embeddings and centroids are fixed, so these are constants of a row, (8 m + 4) bytes of them. The
two products are rounded to float32 from float64, so that no tiling and no number of ranks shows.

Reconstructed: CLIP-CID is said to compare the teacher's and the student's distributions over
clusters by KL (attested at second hand); that the teacher's is kept as its top m is our choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdengine.cluster import kmeans
from kdengine.cluster.embeddings import Embeddings, PartsWriter
from kdengine.losses import similarity_lse
from kdengine.ops import assign
from kdengine.ranks import Ranks

NAMES = ("nearest", "cosines", "lse")
# the scale is where CLIP's own training ends
TOP, SCALE = 64, 100.0


class Rule(NamedTuple):
    """What is asked of every row.

    Attributes:
        centroids: (K, D) float32, unit length.
        top: how many nearest, 1 to K.
        scale: of the softmax.
    """

    centroids: Tensor
    top: int
    scale: float


class Targets(NamedTuple):
    """What a teacher says of rows: ``nearest`` (n, m) int32, ``cosines`` and ``lse`` float32."""

    nearest: Tensor
    cosines: Tensor
    lse: Tensor


def sparse_targets(rows: Tensor, rule: Rule) -> Targets:
    """The nearest centroids of each row, their cosines, and the log-sum-exp over all.

    Shapes: rows (n, D) float32. Gradients: none.
    Work: 2 n K D FLOP in float32 and as many in float64. Memory: 8 K D bytes.
    """
    found = assign(rows, rule.centroids, count=rule.top)
    rows, centroids = rows.double(), rule.centroids.double()
    # the distances are those of float64, and more exact for near rows than a product
    lengths = (rows.square().sum(1)[:, None], centroids.square().sum(1)[found.keys])
    cosines = (lengths[0] + lengths[1] - found.squared_distance.double()) / 2
    lse = similarity_lse(rows, centroids, rule.scale)
    return Targets(found.keys.int(), cosines.float(), lse.float())


def write(
    out: Path, embeddings: Embeddings, rule: Rule, ranks: Ranks, advance: kmeans.Advance
) -> None:
    """Write the targets of all rows, which the ranks share; rank 0 writes.

    Communication: an all-reduce of a block's targets of every rank for each block of a rank.
    """
    top, width = rule.top, embeddings.width
    # what is found of a row, with what finds it
    height = max(1, kmeans.BLOCK_BYTES // (4 * (width + 8 * top)))
    writers = [PartsWriter(out, embeddings, name) for name in NAMES if ranks.first]
    for begin in range(0, embeddings.num_rows, height * ranks.world_size):
        shape = (ranks.world_size, height, 2 * top + 1)
        packed = torch.zeros(shape, dtype=torch.int32, device=ranks.device)
        first = begin + ranks.rank * height
        last = min(first + height, embeddings.num_rows)
        if first < last:
            found = sparse_targets(embeddings.read(first, last).to(ranks.device), rule)
            bits = (found.nearest, found.cosines.view(torch.int32), found.lse.view(torch.int32))
            packed[ranks.rank, : last - first] = torch.cat([*bits[:2], bits[2][:, None]], 1)
            advance(last - first)
        # of every row all ranks but one have zeros
        rows = ranks.sum(packed).flatten(0, 1)[: embeddings.num_rows - begin].cpu()
        nearest, cosines, lse = rows.split([top, top, 1], 1)
        values = Targets(
            nearest,
            cosines.contiguous().view(torch.float32),
            lse.contiguous().view(torch.float32)[:, 0],
        )
        for writer, each in zip(writers, values, strict=False):
            writer.append(each.numpy())
