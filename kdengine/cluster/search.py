# SPDX-License-Identifier: Apache-2.0
"""Which rows of embeddings stay: what is wanted, the search for pairs, and what was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from kdengine.cluster import candidates
from kdengine.cluster.embeddings import Embeddings
from kdengine.cluster.forest import Forest, greedy_cover
from kdengine.cluster.sets import Sets, represent
from kdengine.data.progress import Progress
from kdengine.ranks import join

Rule = Literal["sets", "greedy", "random"]
RETENTION = 0.563
# rows up to which all pairs are looked at, and rows of a coarse cell above
EXACT_ROWS, CELL_ROWS = 100_000, 1024
# rows whose neighbours are found exactly, for the first threshold and for the recall
SAMPLE = 1024
# of what a threshold that was too small grows, and how often
GROWTH, ATTEMPTS = 1.1, 16
# pairs that greedy cover keeps in memory, 16 bytes each
MAX_PAIRS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to keep, and how to find it.

    Attributes:
        rule: ``sets``, the central image of each set of union-find; ``greedy``, in order each image
            that is near none kept before; ``random``, any.
        eps: distance of unit embeddings below which two are near; None calibrates it.
        retention: share of the images to keep, in place of eps; without either ``RETENTION``.
        cells: coarse cells that pairs are looked for in, 0 for all pairs; None chooses.
        probes: further cells that each row looks into.
        seed: of random choices.
    """

    rule: Rule = "sets"
    eps: float | None = None
    retention: float | None = None
    cells: int | None = None
    probes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eps is not None and self.retention is not None:
            raise ValueError(
                "balance: --eps says how many images stay, and so does --retention; got "
                f"{self.eps:g} and {self.retention:g}, leave one away"
            )
        if self.eps is not None and not 0 < self.eps < 2:
            raise ValueError(f"balance: expected --eps between 0 and 2, got {self.eps}")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"balance: expected --retention above 0 and up to 1, got {self.retention}"
            )

    @property
    def share(self) -> float:
        """Of the images to keep, where no threshold is given."""
        return RETENTION if self.retention is None else self.retention

    def asked(self) -> dict[str, Any]:
        """What makes the result another: the defaults written out."""
        return {**asdict(self), "retention": self.share if self.eps is None else None}


@dataclass
class Found:
    """What was found.

    Attributes:
        stands: number of the row that stays for each, int64 [N]; its own where it stays.
        keep: whether each stays, bool [N].
        eps: the threshold; None for a random choice.
        sets: sets of more than one row; None where there are none.
        lengths: of the forest's edges in ascending order, up to the threshold that was searched.
        num_pairs: pairs that were found, some of them twice.
        recall: share of the pairs found, and of those in one set; None where all were looked at.
    """

    stands: np.ndarray
    keep: np.ndarray
    eps: float | None = None
    sets: Sets | None = None
    lengths: np.ndarray | None = None
    num_pairs: int = 0
    recall: tuple[float, float] | None = None


class Search:
    """Finds pairs, and from them who stays."""

    def __init__(self, embeddings: Embeddings, wanted: Wanted, bars: Progress) -> None:
        self._embeddings, self._wanted, self._bars = embeddings, wanted, bars
        self._device = join().device
        count = wanted.cells
        if count is None:
            total = embeddings.num_rows
            count = 0 if total <= EXACT_ROWS else total // CELL_ROWS
        elif count > embeddings.num_rows:
            raise ValueError(
                f"balance: --cells is at most the number of rows, {embeddings.num_rows}; "
                f"got {count}"
            )
        self.count = count
        draw = np.random.default_rng(wanted.seed)
        size = min(SAMPLE, embeddings.num_rows)
        self._sample = np.sort(draw.choice(embeddings.num_rows, size, replace=False))
        self._cells: candidates.Cells | None = None
        if count:
            options = (count, wanted.probes, wanted.seed, self._device)
            advance = self._bar("coarse cells")
            self._cells = candidates.make_cells(embeddings, *options, advance)

    def _bar(self, title: str) -> candidates.Advance:
        advance = self._bars.begin(title, "rows", self._embeddings.num_rows)
        return lambda more: advance(more, more)

    def edges(self, eps: float) -> candidates.Edges:
        """All pairs closer than eps that the cells let be found."""
        advance = self._bar(f"pairs closer than {eps:.4f}")
        if self._cells is None:
            return candidates.exact(self._embeddings, eps, self._device, advance)
        cells = self._cells
        return candidates.within_cells(self._embeddings, cells, eps, self._device, advance)

    def by_sets(self) -> Found:
        """Union-find at a threshold that was given, or at the one that keeps as many as asked."""
        wanted, total = self._wanted, self._embeddings.num_rows
        num_kept = round(wanted.share * total)
        largest = self.first_guess() if wanted.eps is None else wanted.eps
        for _ in range(ATTEMPTS):
            forest = Forest(total)
            for pairs, distances in self.edges(largest):
                forest.add(pairs, distances)
            eps = forest.threshold(num_kept) if wanted.eps is None else wanted.eps
            if eps is not None:
                break
            largest *= GROWTH
        else:
            raise self._no_threshold(largest)
        roots = forest.sets(eps)
        sets = represent(self._embeddings, roots, self._device)
        keep = sets.stands == np.arange(total)
        recall = self.recall(eps, roots)
        return Found(sets.stands, keep, eps, sets, forest.lengths(), forest.num_edges, recall)

    def by_cover(self) -> Found:
        """Greedy cover; a threshold for a share is found by halving between two."""
        wanted, total = self._wanted, self._embeddings.num_rows
        num_kept = round(wanted.share * total)
        largest = self.first_guess() if wanted.eps is None else wanted.eps
        for _ in range(ATTEMPTS):
            pairs, distances = self._all_pairs(largest)
            stands = greedy_cover(total, pairs)
            if wanted.eps is not None or np.sum(stands == np.arange(total)) <= num_kept:
                break
            largest *= GROWTH
        else:
            raise self._no_threshold(largest)
        eps = largest
        if wanted.eps is None:
            low, high = 0.0, largest
            while high - low > 1e-6 * largest:
                middle = (low + high) / 2
                trial = greedy_cover(total, pairs[distances < middle])
                few = np.sum(trial == np.arange(total)) <= num_kept
                low, high = (low, middle) if few else (middle, high)
            eps = high
            stands = greedy_cover(total, pairs[distances < eps])
        keep = stands == np.arange(total)
        return Found(stands, keep, eps, num_pairs=len(pairs), recall=self.recall(eps, None))

    def _all_pairs(self, eps: float) -> tuple[np.ndarray, np.ndarray]:
        found, count = [(np.empty((0, 2), np.int64), np.empty(0))], 0
        for part in self.edges(eps):
            found.append(part)
            count += len(part[0])
            if count > MAX_PAIRS:
                raise ValueError(
                    f"balance: more than {MAX_PAIRS:,} pairs are closer than {eps:.4f}, and greedy "
                    "cover keeps them all in memory; give a smaller --eps, or --rule sets"
                )
        pairs, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
        total = self._embeddings.num_rows
        _, once = np.unique(pairs[:, 0] * total + pairs[:, 1], return_index=True)
        return pairs[once], distances[once]

    def first_guess(self) -> float:
        """A threshold that joins about as many as have to go.

        Of rows with a neighbour within eps about three of four are joined to another: this is the
        distance that so many have one within, by a sample of rows against all.
        """
        share = min(1.0, (1 - self._wanted.share) / 0.75)
        near = candidates.nearest_distances(self._embeddings, self._sample, self._device)
        return max(float(np.quantile(near, share)), 1e-6)

    def recall(self, eps: float, roots: np.ndarray | None) -> tuple[float, float] | None:
        """How many of the pairs of a sample of rows could be found, and are in one set."""
        if self._cells is None:
            return None
        pairs = candidates.neighbours(self._embeddings, self._sample, eps, self._device)
        if not len(pairs):
            return 1.0, 1.0
        found = self._cells.are_candidates(pairs)
        joined = found if roots is None else roots[pairs[:, 0]] == roots[pairs[:, 1]]
        return float(found.mean()), float(joined.mean())

    def _no_threshold(self, eps: float) -> ValueError:
        share = self._wanted.share
        return ValueError(
            f"balance: even at a distance of {eps:.3f} more than {share:.1%} are left of "
            f"{self._embeddings.num_rows:,} rows in {self.count} cells; give --eps, a larger "
            "--retention, or fewer cells"
        )


def at_random(num_rows: int, wanted: Wanted) -> Found:
    """As many as asked for, any: the control that says whether balance does anything."""
    keep = np.zeros(num_rows, bool)
    draw = np.random.default_rng(wanted.seed)
    keep[draw.choice(num_rows, round(wanted.share * num_rows), replace=False)] = True
    # nobody stands for those that go
    return Found(np.where(keep, np.arange(num_rows), -1), keep)
