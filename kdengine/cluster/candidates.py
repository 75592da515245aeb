# SPDX-License-Identifier: Apache-2.0
"""Pairs of near rows: all of them, or those that share a coarse cell.

    exact   every block of rows with itself and all later ones
    cells   each row belongs to the nearest of some centroids and looks into the next nearest ones;
            pairs are found where one of them looks into the other's cell

Blocks of rows stand for shards: pairs across them are found like those within, so there is no
second pass. Reconstructed; CLIP-CID's way to its candidates is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdengine.cluster import kmeans
from kdengine.cluster.embeddings import Embeddings, SomeEmbeddings
from kdengine.ops import assign, range_join
from kdengine.ranks import Ranks

# rows that the cells' centroids are found with, a centroid, and their iterations
SAMPLE_PER_CELL, CELL_ITERATIONS = 64, 6
# differences of pairs that are made at once
PAIR_ELEMENTS = 1 << 22
Edges = Iterator[tuple[np.ndarray, np.ndarray]]
Advance = Callable[[int], None]


def height(embeddings: Embeddings) -> int:
    """Rows of a block."""
    return max(1, kmeans.BLOCK_BYTES // (4 * embeddings.width))


def exact(embeddings: Embeddings, eps: float, device: torch.device, advance: Advance) -> Edges:
    """All pairs closer than eps, (E, 2) int64 with i < j and their distances (E,), in parts.

    Work: N^2 D FLOP. Reads: N / 2 blocks times all rows.
    """
    step, total = height(embeddings), embeddings.num_rows
    for first in range(0, total, step):
        x = embeddings.read(first, min(first + step, total)).to(device)
        yield join(x, x, eps, first, first)
        for other in range(first + step, total, step):
            y = embeddings.read(other, min(other + step, total)).to(device)
            yield join(x, y, eps, first, other)
        advance(len(x))


def join(
    x: Tensor, y: Tensor, eps: float, first: int | np.ndarray, second: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a block with another, or with itself, by the numbers of their rows."""
    pairs = range_join(x, None if y is x else y, eps=eps)
    distances = [
        torch.linalg.vector_norm(x[part[:, 0]].double() - y[part[:, 1]].double(), dim=1)
        for part in pairs.split(max(1, PAIR_ELEMENTS // x.shape[1]))
    ]
    i, j = pairs.cpu().numpy().T
    numbers = np.stack([_numbers(first, i), _numbers(second, j)], 1)
    return np.sort(numbers, 1), torch.cat(distances).cpu().numpy()


def _numbers(first: int | np.ndarray, local: np.ndarray) -> np.ndarray:
    return local + first if isinstance(first, int) else first[local]


@dataclass(frozen=True)
class Cells:
    """Coarse cells of all rows.

    Attributes:
        near: int32 [N, 1 + probes], the cell of each row, then those it looks into.
        count: cells.
    """

    near: np.ndarray
    count: int

    def are_candidates(self, pairs: np.ndarray) -> np.ndarray:
        """Which pairs of rows [E, 2] can be found: bool [E]."""
        i, j = self.near[pairs[:, 0]], self.near[pairs[:, 1]]
        return (i == j[:, :1]).any(1) | (j == i[:, :1]).any(1)


def make_cells(
    embeddings: Embeddings,
    count: int,
    probes: int,
    seed: int,
    device: torch.device,
    advance: Advance,
) -> Cells:
    """Find cells by k-means of a sample, and the nearest of them for every row.

    Memory: 4 (1 + probes) bytes a row.
    """
    total = embeddings.num_rows
    draw = np.random.default_rng(seed)
    size = min(total, SAMPLE_PER_CELL * count)
    sample = SomeEmbeddings(embeddings, np.sort(draw.choice(total, size, replace=False)))
    state = kmeans.start(sample, count, seed)
    alone = Ranks(0, 1, 0, device)
    for _ in range(CELL_ITERATIONS):
        kmeans.iterate(sample, state, alone, lambda more: None)
    centroids = state.centroids.to(device)
    near = np.empty((total, min(count, 1 + probes)), np.int32)
    step = height(embeddings)
    for first in range(0, total, step):
        block = embeddings.read(first, min(first + step, total)).to(device)
        near[first : first + step] = assign(block, centroids, count=near.shape[1]).keys.cpu()
        advance(len(block))
    return Cells(near, count)


def within_cells(
    embeddings: Embeddings, cells: Cells, eps: float, device: torch.device, advance: Advance
) -> Edges:
    """Pairs closer than eps of which one looks into the other's cell; some come twice.

    Work: about (1 / 2 + probes) N^2 / cells 2 D FLOP. Memory: 8 (1 + probes) bytes a row, a block.
    """
    members = [Members(cells.near[:, place], cells.count) for place in range(cells.near.shape[1])]
    step = height(embeddings)
    for cell in range(cells.count):
        own = members[0].of(cell)
        others = np.sort(np.concatenate([m.of(cell) for m in members[1:]] or [own[:0]]))
        for first in range(0, len(own), step):
            numbers = own[first : first + step]
            x = embeddings.take(numbers).to(device)
            yield join(x, x, eps, numbers, numbers)
            later = np.concatenate([own[first + step :], others])
            for second in range(0, len(later), step):
                some = later[second : second + step]
                yield join(x, embeddings.take(some).to(device), eps, numbers, some)
        advance(len(own))


class Members:
    """The rows of each cell, from the cell of each row."""

    def __init__(self, cell_of: np.ndarray, count: int) -> None:
        self._order = np.argsort(cell_of, kind="stable")
        self._starts = np.searchsorted(cell_of[self._order], np.arange(count + 1))

    def of(self, cell: int) -> np.ndarray:
        """The rows of one, in ascending order."""
        return self._order[self._starts[cell] : self._starts[cell + 1]]


def neighbours(
    embeddings: Embeddings, numbers: np.ndarray, eps: float, device: torch.device
) -> np.ndarray:
    """All pairs of these rows with others closer than eps: [E, 2], of which the first is theirs."""
    x = embeddings.take(numbers).to(device)
    found, step = [], height(embeddings)
    for first in range(0, embeddings.num_rows, step):
        y = embeddings.read(first, min(first + step, embeddings.num_rows)).to(device)
        i, j = range_join(x, y, eps=eps).cpu().numpy().T
        found.append(np.stack([numbers[i], j + first], 1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def nearest_distances(
    embeddings: Embeddings, numbers: np.ndarray, device: torch.device
) -> np.ndarray:
    """Of some rows the distance to the nearest other one: float64 [n]."""
    x = embeddings.take(numbers).to(device)
    best = torch.full((len(numbers), 2), torch.inf, device=device)
    step = height(embeddings)
    for first in range(0, embeddings.num_rows, step):
        y = embeddings.read(first, min(first + step, embeddings.num_rows)).to(device)
        squares = assign(x, y, count=min(2, len(y))).squared_distance
        best = torch.cat([best, squares], 1).sort(1).values[:, :2]
    # the nearest of all is the row itself
    return best[:, 1].double().sqrt().cpu().numpy()
