# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend's short cut on a CPU: one exponential a logit for rows and columns.

Exponentials relative to the maximum of their row, ``E_ij = exp(z_ij - top_i)``, give the sums of
the columns too, by a product with ``exp(top_i - C)``; and in the backward

    w_i exp(z_ij - a_i) + v_j exp(z_ij - b_j)
        = exp(z_ij - a_i) (w_i + exp(a_i - c) v_j exp(c - b_j))

for any constants C and c. That halves the passes over a strip. It needs both directions, positives
that are each other's (the i-th pair, by default), and statistics that lie so near to each other
that no term is lost; this is looked at here, on the host, and where it does not hold the general
way is taken.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdengine.ops.similarity_torch import Product

# least sum of a column, and largest distance of two statistics in nats: what is lost beyond them is
# below the dtype's rounding
LEAST = {torch.float32: 2.0**-80, torch.float64: 2.0**-900}
SPREAD = {torch.float32: 40.0, torch.float64: 500.0}


def are_pairs(labels: Tensor, col_labels: Tensor) -> bool:
    """Whether every positive of a row is its column's positive, and the other way round."""

    def one_way(mine: Tensor, others: Tensor) -> bool:
        numbers = torch.arange(len(mine))
        inside = (mine >= 0) & (mine < len(others))
        return bool((others[mine[inside]] == numbers[inside]).all())

    return one_way(labels, col_labels) and one_way(col_labels, labels)


def forward(
    sources: "Sequence[Product]", strips: Sequence[slice], z: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The statistics of rows, columns and teachers of pairs; None where a column lost terms.

    Args:
        sources: the student's product, then those of the teachers.
        strips: of the rows.
        z: a buffer that holds the tallest.
        labels: positives of the rows.
    """
    num_rows, num_cols = len(labels), z.shape[1]
    inside = (labels >= 0) & (labels < num_cols)
    places = labels.clamp(0, num_cols - 1)
    rows = [z.new_empty(4 if k else 2, num_rows) for k in range(len(sources))]
    cols = [z.new_zeros(4 if k else 2, num_cols) for k in range(len(sources))]
    peaks = [-torch.inf] * len(sources)
    buffers = [torch.empty_like(z) for _ in range(4 if len(sources) > 1 else 1)]
    for strip in strips:
        height = strip.stop - strip.start
        at, named = places[strip, None], inside[strip, None]
        logits = sources[0].strip(strip, z)
        work = buffers[0][:height]
        for k, source in enumerate(sources):
            x = source.strip(strip, buffers[1]) if k else logits
            positive = x.gather(1, at)
            x.scatter_(1, at, positive.masked_fill(named, -torch.inf))
            # finite also where the positive was all there is
            top = x.amax(1).clamp(min=torch.finfo(z.dtype).min)
            torch.sub(x, top[:, None], out=work).exp_()
            x.scatter_(1, at, positive)
            peak = max(peaks[k], top.max().item())
            cols[k] *= math.exp(peaks[k] - peak)
            peaks[k] = peak
            weights = (top - peak).exp()
            total = work.sum(1)
            cols[k][0] += work.mT @ weights
            rows[k][0, strip] = top + total.log()
            rows[k][1, strip] = positive[:, 0].where(inside[strip], 0)
            if k:
                gap, product = (buffer[:height] for buffer in buffers[2:])
                torch.sub(x, logits, out=gap)
                for i, weighed in ((2, gap), (3, x)):
                    torch.mul(work, weighed, out=product)
                    # the largest exponential is 1, so a total below 1 is the 0 of an empty sum
                    rows[k][i, strip] = product.sum(1) / total.clamp(min=1)
                    cols[k][i] += product.mT @ weights
    if any((side[0] < LEAST[z.dtype]).any() for side in cols):
        return None
    for k, side in enumerate(cols):
        side[2:] /= side[0]
        side[0] = side[0].log() + peaks[k]
        side[1, places[inside]] = rows[k][1, inside]
    row_teachers, col_teachers = (
        torch.stack(x[1:]) if x[1:] else z.new_empty(0, 4, 0) for x in (rows, cols)
    )
    return rows[0], cols[0], row_teachers, col_teachers


def can_share(statistics: Sequence[Tensor]) -> bool:
    """Whether the exponentials of the rows serve the columns as well."""
    row_lse, col_lse = statistics[0][:1], statistics[1][:1]
    pairs = [(row_lse, col_lse)]
    pairs += list(zip(statistics[2][:, 0], statistics[3][:, 0], strict=True))
    return all(bool(a.max() - b.min() <= SPREAD[a.dtype]) for a, b in pairs)


def backward(
    sources: "Sequence[Product]",
    strip: slice,
    z: Tensor,
    buffers: Sequence[Tensor],
    labels: Tensor,
    statistics: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> Tensor:
    """The gradient of one strip's logits, in the first of two buffers."""
    height = strip.stop - strip.start
    g, factor = (buffer[:height] for buffer in buffers)
    for k, source in enumerate(sources):
        x = source.strip(strip, z)
        i = max(0, k - 1)
        a, b = (statistics[2][i, 0], statistics[3][i, 0]) if k else (s[0] for s in statistics[:2])
        w, v = (grads[2][i, 2], grads[3][i, 2]) if k else (d[0] for d in grads[:2])
        middle = (a.max() + b.min()) / 2
        up, down = (a[strip] - middle).exp(), v * (middle - b).exp()
        torch.addcmul(w[strip, None], up[:, None], down, out=factor)
        e = x.sub_(a[strip, None]).exp_()
        if k:
            g.addcmul_(e, factor, value=-1)
        else:
            torch.mul(e, factor, out=g)
    inside = (labels[strip] >= 0) & (labels[strip] < z.shape[1])
    places = labels[strip].clamp(0, z.shape[1] - 1)
    wanted = grads[0][1, strip] + grads[1][1, places]
    kept = g.gather(1, places[:, None])[:, 0]
    g.scatter_(1, places[:, None], torch.where(inside, wanted, kept)[:, None])
    return g
