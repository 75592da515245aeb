# SPDX-License-Identifier: Apache-2.0
"""Sets of like images: the member that stays, and how wide the set is.

    c_S = mean of the members,   kept = argmin_{i in S} ||x_i - c_S||,   ties to the smallest number

That the central image stays is attested of CLIP-CID at second hand; the mean is not made unit
length here (its direction is the same, its distances order the members alike).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdengine.cluster.embeddings import Embeddings

# members of several sets that are looked at together
BATCH = 1 << 14
# distances to a mean are equal up to this, such as those of two members
TIE = 1e-9
# members of a set whose diameter is measured between all pairs
EXACT_DIAMETER = 4096


@dataclass
class Sets:
    """The sets of more than one row, in the order of their first rows.

    Attributes:
        stands: of every row the number of the one that stays for it, int64 [N].
        sizes: members of each set.
        diameters: largest distance within each; of sets above ``EXACT_DIAMETER`` a lower bound.
    """

    stands: np.ndarray
    sizes: np.ndarray
    diameters: np.ndarray


def represent(embeddings: Embeddings, roots: np.ndarray, device: torch.device) -> Sets:
    """The representatives of sets.

    Args:
        embeddings: the rows.
        roots: the smallest number in the set of each row.
        device: where to compute.

    Memory: 32 bytes a row and the rows of the largest set, or of ``BATCH``.
    """
    order = np.argsort(roots, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(roots[order]) > 0])
    sizes = np.diff(np.r_[starts, len(order)])
    several = sizes > 1
    starts, sizes = starts[several], sizes[several]
    stands, diameters = np.arange(len(roots)), np.empty(len(sizes))
    for sets in _batches(sizes):
        members = [order[s : s + n] for s, n in zip(starts[sets], sizes[sets], strict=True)]
        rows = embeddings.take(np.concatenate(members)).to(device).double()
        for number, own, x in zip(
            range(sets.start, sets.stop), members, rows.split(list(map(len, members))), strict=True
        ):
            kept = 0 if len(own) == 2 else central(x)
            stands[own] = own[kept]
            diameters[number] = diameter(x, kept)
    return Sets(stands, sizes, diameters)


def central(x: Tensor) -> int:
    """The first of the rows nearest to their mean."""
    distances = torch.linalg.vector_norm(x - x.mean(0), dim=1)
    return int((distances <= distances.min() + TIE).nonzero()[0])


def diameter(x: Tensor, start: int) -> float:
    """The largest distance between two rows, or for very many at least that of two far ones."""
    if len(x) <= EXACT_DIAMETER:
        return float(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").max())
    far = torch.linalg.vector_norm(x - x[start], dim=1).argmax()
    return float(torch.linalg.vector_norm(x - x[far], dim=1).max())


def _batches(sizes: np.ndarray) -> Iterator[slice]:
    """Neighbouring sets with about ``BATCH`` members."""
    ends, first = np.cumsum(sizes), 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BATCH, side="right")))
        yield slice(first, last)
        first = last
