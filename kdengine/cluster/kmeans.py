# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means over unit rows that are read block by block, on one rank or several.

    label_i = argmin_k ||x_i - c_k||,   c_k = normalise(sum of the rows with label k)

Sums are of integers, x rounded to multiples of 2^-36: their order changes nothing, so any blocks
and any number of ranks give the same centroids to the last bit, and a run that goes on after an
interruption those of one that was not interrupted.

Reconstructed: CLIP-CID is said to cluster teacher embeddings by k-means (attested at second hand);
unit length, k and everything else here are the team's other papers' or our choice
(UNICOM and MLCD take k = 10^6 for LAION-400M, CLIP ViT-L/14 embeddings).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.cluster.embeddings import Embeddings
from kdengine.ops import assign
from kdengine.ranks import Ranks

# told how many rows are done
Advance = Callable[[int], None]
# bytes of a block of rows in float32
BLOCK_BYTES = 32 << 20
# a sum of 2^27 unit values fits into 63 bits
UNIT = 2.0**36
# of squared distances, at most 4 each, of 2^29 rows
SQUARE_UNIT = 2.0**32
# a row that is halved between a large cluster and an empty one moves by so much, as in faiss
SPLIT = 1 / 1024


@dataclass
class State:
    """Where the iterations are.

    Attributes:
        centroids: (K, D) float32, unit length.
        objectives: mean squared distance of each iteration so far.
        num_split: empty clusters that were filled, in each iteration.
    """

    centroids: Tensor
    objectives: list[float] = field(default_factory=list)
    num_split: list[int] = field(default_factory=list)


def start(embeddings: Embeddings, k: int, seed: int) -> State:
    """Centroids at ``k`` different rows, drawn at random."""
    numbers = np.random.default_rng(seed).choice(embeddings.num_rows, k, replace=False)
    return State(embeddings.take(np.sort(numbers)))


def iterate(embeddings: Embeddings, state: State, ranks: Ranks, advance: Advance) -> None:
    """One iteration: labels by the centroids, then centroids by the labels.

    Communication: one all-reduce of K (D + 1) integers of 8 bytes.
    """
    k, width = state.centroids.shape
    centroids = state.centroids.to(ranks.device)
    sums = torch.zeros(k, width, dtype=torch.int64, device=ranks.device)
    counts = torch.zeros(k, dtype=torch.int64, device=ranks.device)
    squares = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    for _, block, labels, distances in labelled(embeddings, centroids, ranks, advance):
        sums.index_add_(0, labels, (block.double() * UNIT).round_().long())
        counts += torch.bincount(labels, minlength=k)
        squares += (distances.double() * SQUARE_UNIT).round_().long().sum()
    for values in (sums, counts, squares):
        ranks.sum(values)
    state.objectives.append(float(squares.double()[0] / SQUARE_UNIT / embeddings.num_rows))
    means = sums.double()
    lengths = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    # rows that cancel have no direction; the centroid stays
    moved = torch.where(lengths > 1, means / lengths.clamp(min=1), centroids.double())
    centroids, num_split = fill_empty(F.normalize(moved, dim=1).float().cpu(), counts.cpu())
    state.centroids = centroids
    state.num_split.append(num_split)


def labelled(
    embeddings: Embeddings, centroids: Tensor, ranks: Ranks, advance: Advance
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """This rank's blocks: number of the first row, rows, labels, squared distances."""
    height = max(1, BLOCK_BYTES // (4 * embeddings.width))
    for first in range(ranks.rank * height, embeddings.num_rows, ranks.world_size * height):
        last = min(first + height, embeddings.num_rows)
        block = embeddings.read(first, last).to(ranks.device)
        found = assign(block, centroids)
        yield first, block, found.keys[:, 0], found.squared_distance[:, 0]
        advance(last - first)


def fill_empty(centroids: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Give every empty cluster half of a large one: both stand a little beside its centroid.

    The largest is taken, the first of equally large ones, and then counts as half as large.
    """
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return centroids, 0
    heap = [(-float(size), number) for number, size in enumerate(counts.tolist()) if size > 1]
    heapq.heapify(heap)
    signs = torch.ones(centroids.shape[1])
    signs[1::2] = -1
    num_split = 0
    for number in empty:
        if not heap or -heap[0][0] < 2:
            break
        size, donor = heap[0]
        whole = centroids[donor].clone()
        centroids[number] = F.normalize(whole * (1 + SPLIT * signs), dim=0)
        centroids[donor] = F.normalize(whole * (1 - SPLIT * signs), dim=0)
        heapq.heapreplace(heap, (size / 2, donor))
        heapq.heappush(heap, (size / 2, number))
        num_split += 1
    return centroids, num_split


def final_labels(
    embeddings: Embeddings, state: State, ranks: Ranks, advance: Advance
) -> tuple[Tensor, np.ndarray, float]:
    """Labels by the last centroids, of which those without a row are dropped.

    Returns: centroids (k, D) of which each has a row, labels int32 (N,), mean squared distance;
    equal on every rank.

    Memory / communication: 4 bytes a row on each rank; one all-reduce of them.
    """
    centroids = state.centroids.to(ranks.device)
    labels = torch.zeros(embeddings.num_rows, dtype=torch.int32, device=ranks.device)
    squares = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    for first, block, own, distances in labelled(embeddings, centroids, ranks, advance):
        labels[first : first + len(block)] = own.int()
        squares += (distances.double() * SQUARE_UNIT).round_().long().sum()
    for values in (labels, squares):
        ranks.sum(values)
    used, renumbered = labels.unique(return_inverse=True)
    objective = float(squares.double()[0] / SQUARE_UNIT / embeddings.num_rows)
    return state.centroids[used.long().cpu()], renumbered.int().cpu().numpy(), objective
