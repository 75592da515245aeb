# SPDX-License-Identifier: Apache-2.0
"""Which rows hang together at every threshold, from edges that are seen once and not kept.

Sets joined by edges shorter than eps (union-find, single linkage) are those of a minimal spanning
forest cut at eps. A forest has fewer edges than rows, and that of two collections of edges is that
of their forests' edges: so edges may come in any order and number, and only a forest is kept. It
holds the sets of every threshold up to that of the edges, and so which threshold keeps how many.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

# edges that wait until the forest is made anew, at least
PENDING = 1 << 22


class Forest:
    """A minimal spanning forest of rows.

    Attributes:
        num_edges: edges seen.

    Memory: 24 bytes an edge of the forest or waiting (at most 2 N, or 2^22), three times that
    while the forest is made anew.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_edges = 0
        self._pairs = np.empty((0, 2), np.int64)
        self._distances = np.empty(0)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(self, pairs: np.ndarray, distances: np.ndarray) -> None:
        """Take edges (E, 2) and their lengths (E,)."""
        self.num_edges += len(pairs)
        self._waiting.append((pairs, distances))
        self._num_waiting += len(pairs)
        if self._num_waiting > max(PENDING, self.num_rows):
            self._renew()

    def _renew(self) -> None:
        if not self._num_waiting:
            return
        pairs = np.concatenate([self._pairs, *(p for p, _ in self._waiting)])
        distances = np.concatenate([self._distances, *(d for _, d in self._waiting)])
        self._waiting, self._num_waiting = [], 0
        # of an edge that was seen twice once
        numbers = np.minimum(*pairs.T) * self.num_rows + np.maximum(*pairs.T)
        _, once = np.unique(numbers, return_index=True)
        order = once[np.argsort(distances[once], kind="stable")]
        pairs, distances = pairs[order], distances[order]
        # places stand for the lengths, because scipy takes a length of 0 for no edge
        places = np.arange(1, len(order) + 1, dtype=np.float64)
        shape = (self.num_rows, self.num_rows)
        graph = coo_matrix((places, pairs.T.astype(np.int32)), shape).tocsr()
        kept = np.sort(minimum_spanning_tree(graph, overwrite=True).data).astype(np.int64) - 1
        self._pairs, self._distances = pairs[kept], distances[kept]

    def lengths(self) -> np.ndarray:
        """Of the forest's edges, in ascending order: each shorter than eps joins two sets."""
        self._renew()
        return self._distances

    def threshold(self, num_kept: int) -> float | None:
        """The smallest eps at which at most ``num_kept`` sets are left; None beyond the edges."""
        lengths, needed = self.lengths(), self.num_rows - num_kept
        if needed <= 0:
            return 0.0
        return None if len(lengths) < needed else float(np.nextafter(lengths[needed - 1], np.inf))

    def sets(self, eps: float) -> np.ndarray:
        """The smallest number of each row's set, int64 [N], joined by edges shorter than eps."""
        count = int(np.searchsorted(self.lengths(), eps, side="left"))
        pairs = self._pairs[:count]
        shape = (self.num_rows, self.num_rows)
        graph = coo_matrix((np.ones(count, bool), pairs.T.astype(np.int32)), shape)
        _, labels = connected_components(graph, directed=False)
        smallest = np.full(int(labels.max()) + 1, self.num_rows, np.int64)
        np.minimum.at(smallest, labels, np.arange(self.num_rows))
        return smallest[labels]


def greedy_cover(num_rows: int, pairs: np.ndarray) -> np.ndarray:
    """Who stands for each row, int64 [N]: itself, or the first row kept before that is near.

    Rows are taken in order, and one near a row that was kept is not kept: so no two that are kept
    are near each other, and every one that is not is near one that is. Another order keeps others.
    """
    # of each pair the later row asks the earlier one
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    earlier, later = pairs[order].T
    starts = np.searchsorted(later, np.arange(num_rows + 1))
    stands = np.arange(num_rows)
    for row in np.unique(later):
        near = earlier[starts[row] : starts[row + 1]]
        kept = near[stands[near] == near]
        if len(kept):
            stands[row] = kept[0]
    return stands
