# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``similarity``: strips of rows, on any device.

Both sweeps walk over strips of C rows and hold a few C x M buffers, whatever B is. The forward
reduces each strip along its rows (complete at once) and along its columns (merged over strips
with a running maximum, so that no logit overflows or vanishes). The backward computes the strip
again, writes the gradient of its logits, and multiplies it into both features' gradients; teacher
and student are subtracted before these products, in full precision.

A *positive* is the one cell of a row (or column) that its label names. Sums leave it out, so that
confident positives keep their relative accuracy. A label outside the matrix names no cell.

Legend: B rows, M columns, C rows of a strip, K teachers; D and E widths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdengine.ops import similarity_shared
from kdengine.ops.similarity_product import NUM_BUFFERS, Product, cut, products


class Cells(NamedTuple):
    """Where the positives of a strip lie along ``dim``, and which of them are in it."""

    places: Tensor
    inside: Tensor
    dim: int

    def take(self, strip: Tensor) -> Tensor:
        """What stands at the positives (anything where there is none)."""
        return strip.gather(self.dim, self.places)

    def put(self, strip: Tensor, values: Tensor) -> None:
        """Overwrite the positives."""
        strip.scatter_(self.dim, self.places, torch.where(self.inside, values, self.take(strip)))


class Sums(NamedTuple):
    """A strip reduced along one dimension, positives left out, relative to ``top``.

    ``total`` is the sum of exponentials; ``weighted`` are sums that have them as weights.
    """

    top: Tensor
    total: Tensor
    positive: Tensor
    weighted: list[Tensor]

    def merge(self, other: "Sums") -> "Sums":
        """The sums over two disjoint sets of rows."""
        top = torch.maximum(self.top, other.top)
        mine, theirs = (self.top - top).exp(), (other.top - top).exp()
        weighted = zip(self.weighted, other.weighted, strict=True)
        return Sums(
            top,
            self.total * mine + other.total * theirs,
            self.positive + other.positive,
            [a * mine + b * theirs for a, b in weighted],
        )

    def pack(self) -> Tensor:
        """Log-sum-exp, positive and weighted means, one row each."""
        # the largest exponential is 1, so a total below 1 is the 0 of an empty sum
        means = [x / self.total.clamp(min=1) for x in self.weighted]
        lse = self.top + self.total.log()
        return torch.stack([x.flatten() for x in (lse, self.positive, *means)])


class Side:
    """One direction of the matrix: ``dim`` 1 reduces rows, ``dim`` 0 reduces columns."""

    def __init__(self, dim: int, labels: Tensor) -> None:
        self.dim = dim
        self.labels = labels
        self.parts: dict[int, list[Sums]] = {}

    def cells(self, rows: slice, num_cols: int) -> Cells:
        """The positives inside the strip of these rows."""
        if self.dim == 1:
            local, size = self.labels[rows], num_cols
        else:
            local, size = self.labels - rows.start, rows.stop - rows.start
        places, inside = local.clamp(0, size - 1), (local >= 0) & (local < size)
        return Cells(places.unsqueeze(self.dim), inside.unsqueeze(self.dim), self.dim)

    def across(self, vector: Tensor, rows: slice) -> Tensor:
        """What of a vector of this side belongs to the strip, shaped to broadcast over it."""
        return (vector[rows] if self.dim == 1 else vector).unsqueeze(self.dim)

    def add(self, source: int, sums: Sums) -> None:
        """Take in a strip's sums; source 0 is the student, k the k-th teacher."""
        parts = self.parts.setdefault(source, [])
        if self.dim == 0 and parts:
            parts[0] = parts[0].merge(sums)
        else:
            parts.append(sums)

    def result(self, source: int) -> Tensor:
        """The packed sums of all strips."""
        return torch.cat([sums.pack() for sums in self.parts[source]], dim=1)


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    on_rows: bool,
    on_cols: bool,
    soft_rows: bool,
    soft_cols: bool,
    means: bool,
    attend: bool,
    keep: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of rows, columns and teachers; see ``kdengine.ops.similarity``."""
    features = (query, key, scale, teacher_query, teacher_key, teacher_scale)
    sources = products(*features, budget)
    sources = sources if soft_rows or soft_cols else sources[:1]
    student, *teachers = sources
    shape = (len(sources) if keep else 0, len(query), len(key))
    all_logits = query.new_empty(shape, dtype=student.dtype)
    for source, kept in zip(sources, all_logits, strict=False):
        source.kept = kept
    row_side, col_side = Side(1, labels), Side(0, col_labels)
    hard = [row_side] * on_rows + [col_side] * on_cols
    soft = [row_side] * soft_rows + [col_side] * soft_cols
    budget -= all_logits.nbytes
    both = on_rows and on_cols and soft_rows == soft_cols and not means
    if both and not query.is_cuda and min(len(labels), len(col_labels)) > 1:
        if similarity_shared.are_pairs(labels, col_labels):
            found = similarity_shared.forward(sources, *cut(student, budget), labels)
            if found is not None:
                return (*found, found[0].new_empty(0, key.shape[1]), all_logits)
    strips, z = cut(student, budget, NUM_BUFFERS + bool(teachers))
    work = torch.empty_like(z)
    temp = torch.empty_like(z) if means or soft else z
    t, gap = (torch.empty_like(z), torch.empty_like(z)) if teachers else (z, z)
    attended = z.new_empty(len(query) if attend else 0, key.shape[1])
    for rows in strips:
        here = slice(rows.stop - rows.start)
        logits = student.strip(rows, z)
        weigh = [logits] if means else []
        for side in hard:
            cells = side.cells(rows, z.shape[1])
            sums = reduce(logits, cells, weigh, work[here], temp[here])
            side.add(0, sums)
        if attend:
            # the rows are the only side, so ``work`` holds their exponentials
            student.pull(work[here], attended[rows]).div_(sums.total.clamp(min=1))
        for k, teacher in enumerate(teachers, start=1):
            targets = teacher.strip(rows, t)
            weigh = [torch.sub(targets, logits, out=gap[here]), targets]
            for side in soft:
                cells = side.cells(rows, z.shape[1])
                side.add(k, reduce(targets, cells, weigh, work[here], temp[here]))
    numbers = range(1, 1 + len(teachers))
    return (
        row_side.result(0) if on_rows else z.new_empty(2 + means, 0),
        col_side.result(0) if on_cols else z.new_empty(2 + means, 0),
        torch.stack([row_side.result(k) for k in numbers]) if soft_rows else z.new_empty(0, 4, 0),
        torch.stack([col_side.result(k) for k in numbers]) if soft_cols else z.new_empty(0, 4, 0),
        attended,
        all_logits,
    )


def reduce(z: Tensor, cells: Cells, weigh: Sequence[Tensor], work: Tensor, temp: Tensor) -> Sums:
    """Reduce a strip of logits along ``cells.dim``; ``weigh`` are strips to average as well."""
    positive = cells.take(z)
    cells.put(z, torch.full_like(positive, -torch.inf))
    # clamped, so that it is finite also where the positive was all there is
    top = z.amax(cells.dim, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    torch.sub(z, top, out=work).exp_()
    cells.put(z, positive)
    weighted = [torch.mul(work, x, out=temp).sum(cells.dim, keepdim=True) for x in weigh]
    total = work.sum(cells.dim, keepdim=True)
    return Sums(top, total, torch.where(cells.inside, positive, 0), weighted)


def backward(
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    statistics: Sequence[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; one that is not needed is empty."""
    features = (query, key, scale, teacher_query, teacher_key, teacher_scale)
    sources = products(*features, budget)
    student = sources[0]
    for source, kept in zip(sources, logits, strict=False):
        source.kept, source.is_known = kept, True
    row_side, col_side = Side(1, labels), Side(0, col_labels)
    row_pulls = pulls(row_side, statistics[0], grads[0], statistics[2], grads[2])
    col_pulls = pulls(col_side, statistics[1], grads[1], statistics[3], grads[3])
    left = torch.empty_like(query if need_query else query.new_empty(0))
    right = torch.empty_like(key if need_key else key.new_empty(0), dtype=student.dtype)
    strips, z = cut(student, budget - logits.nbytes)
    g, work = torch.empty_like(z), torch.empty_like(z)
    both = all(s.shape[-1] for s in statistics[:2]) and len(statistics[2]) == len(statistics[3])
    factors = None
    if both:
        sources = sources[: 1 + len(statistics[2])]
        if not z.is_cuda and similarity_shared.are_pairs(labels, col_labels):
            factors = similarity_shared.factors(sources, statistics, grads)
    grad_scale = z.new_zeros(() if need_scale else (0,))
    for strip in strips:
        here = slice(strip.stop - strip.start)
        if factors is not None:
            residual = similarity_shared.backward(
                sources, strip, z, (g, work), labels, factors, grads
            )
        else:
            residual = add_pulls(sources, (*row_pulls, *col_pulls), strip, z, g[here], work[here])
        own = query[strip].to(z.dtype)
        if need_query or need_scale:
            in_place = need_query and left.dtype == z.dtype
            pulled = student.pull(residual, left[strip] if in_place else torch.empty_like(own))
            if need_scale:
                # with z = scale * cosine it is the radial part of the features' gradient
                grad_scale += (pulled * own).sum()
            pulled.mul_(student.scale)
            if need_query and not in_place:
                left[strip] = pulled
        if need_key and strip.start:
            right.addmm_(residual.mT, own)
        elif need_key:
            torch.mm(residual.mT, own, out=right)
    right.mul_(student.scale)
    return (
        left,
        right.to(key.dtype) if need_key else key.new_empty(0),
        grad_scale.to(scale.dtype),
    )


def add_pulls(
    sources: Sequence[Product],
    pulls: Sequence["Pull"],
    strip: slice,
    z: Tensor,
    residual: Tensor,
    work: Tensor,
) -> Tensor:
    """The gradient of one strip's logits, in ``residual``."""
    residual.zero_()
    for k, source in enumerate(sources):
        wanted = [pull for pull in pulls if pull.source == k]
        logits = source.strip(strip, z) if wanted else z
        for pull in wanted:
            pull.add_to(residual, strip, logits, work)
    return residual


class Pull(NamedTuple):
    """One softmax in the gradient of the logits: ``weight * exp(logits - lse)``.

    At the positives stands ``positive`` instead.
    """

    source: int
    side: Side
    lse: Tensor
    weight: Tensor
    positive: Tensor

    def add_to(self, residual: Tensor, rows: slice, logits: Tensor, work: Tensor) -> None:
        """Add the term to the gradient of one strip's logits."""
        side, cells = self.side, self.side.cells(rows, logits.shape[1])
        torch.sub(logits, side.across(self.lse, rows), out=work).exp_()
        # a positive can be so far above the others that it overflowed here
        cells.put(work, torch.zeros_like(cells.places, dtype=work.dtype))
        residual.addcmul_(work, side.across(self.weight, rows))
        cells.put(residual, cells.take(residual) + side.across(self.positive, rows))


def pulls(
    side: Side, student: Tensor, grad: Tensor, teachers: Tensor, teacher_grad: Tensor
) -> list[Pull]:
    """The softmaxes of one side: the student's, then those of the teachers."""
    found = []
    if student.numel():
        found.append(Pull(0, side, student[0], grad[0], grad[1]))
    for k in range(len(teachers)):
        weight = -teacher_grad[k, 2]
        found.append(Pull(1 + k, side, teachers[k, 0], weight, torch.zeros_like(weight)))
    return found
