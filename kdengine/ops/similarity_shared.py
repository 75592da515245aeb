# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend's short cut on a CPU: one exponential a logit for rows and columns.

Exponentials relative to a constant C, ``E_ij = exp(z_ij - C)``, are added up along rows and along
columns; and in the backward

    w_i exp(z_ij - a_i) + v_j exp(z_ij - b_j) = E_ij (w_i exp(C - a_i) + v_j exp(C - b_j))

That halves the passes over a strip. With unit features ``C = max(scale - H, 0)`` lets nothing
overflow. It needs both directions, positives that are each other's (the i-th pair, by default),
and sums so near to C that no term is lost; this is looked at here, on the host, and where it does
not hold the general way is taken.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdengine.ops.similarity_product import Product

# H, in nats
HEADROOM = {torch.float32: 60.0, torch.float64: 500.0}
# logarithms of the sums that lose nothing: below, terms may have vanished; above, products with
# logits may overflow
LEAST = {torch.float32: -55.0, torch.float64: -600.0}
MOST = {torch.float32: 80.0, torch.float64: 690.0}


class Factor(NamedTuple):
    """What the exponentials of a matrix are multiplied by: ``of_row_i + of_col_j``."""

    of_rows: Tensor
    of_cols: Tensor
    constant: float


def are_pairs(labels: Tensor, col_labels: Tensor) -> bool:
    """Whether every positive of a row is its column's positive, and the other way round."""
    numbers = torch.arange(max(len(labels), len(col_labels)))

    def one_way(mine: Tensor, others: Tensor) -> bool:
        inside = (mine >= 0) & (mine < len(others))
        return bool((others[mine[inside]] == numbers[: len(mine)][inside]).all())

    if all(torch.equal(x, numbers[: len(x)]) for x in (labels, col_labels)):
        return True
    return one_way(labels, col_labels) and one_way(col_labels, labels)


def forward(
    sources: "Sequence[Product]", strips: Sequence[slice], z: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The statistics of rows, columns and teachers of pairs; None where a sum lost terms.

    Args:
        sources: the student's product, then those of the teachers.
        strips: of the rows.
        z: a buffer that holds the tallest.
        labels: positives of the rows.
    """
    num_rows, num_cols = len(labels), z.shape[1]
    inside = (labels >= 0) & (labels < num_cols)
    places = labels.clamp(0, num_cols - 1)[:, None]
    constants = [constant(source) for source in sources]
    # totals, positives, and for teachers sums that have the exponentials as weights
    rows = [z.new_empty(4 if k else 2, num_rows) for k in range(len(sources))]
    cols = [z.new_zeros(4 if k else 2, num_cols) for k in range(len(sources))]
    buffers = [torch.empty_like(z) for _ in range(3 if len(sources) > 1 else 1)]
    for strip in strips:
        height, named = strip.stop - strip.start, inside[strip, None]
        e = buffers[0][:height]
        logits = sources[0].strip(strip, z)
        for k, source in enumerate(sources):
            x = source.strip(strip, buffers[1]) if k else logits
            positive = x.gather(1, places[strip])
            exponentials(x, constants[k], e)
            e.scatter_(1, places[strip], e.gather(1, places[strip]).masked_fill(named, 0))
            rows[k][1, strip] = positive.masked_fill(~named, 0)[:, 0]
            add(e, 0, rows[k], cols[k], strip)
            if k:
                product = buffers[2][:height]
                add(torch.sub(x, logits, out=product).mul_(e), 2, rows[k], cols[k], strip)
                add(torch.mul(x, e, out=product), 3, rows[k], cols[k], strip)
    for side in (rows, cols):
        for x, shift in zip(side, constants, strict=True):
            x[2:] /= x[0]
            x[0] = x[0].log() + shift
            if not in_range(x[0], shift):
                return None
    for row, col in zip(rows, cols, strict=True):
        col[1, places[inside, 0]] = row[1, inside]
    row_teachers, col_teachers = (
        torch.stack(x[1:]) if x[1:] else z.new_empty(0, 4, 0) for x in (rows, cols)
    )
    return rows[0], cols[0], row_teachers, col_teachers


def constant(source: "Product") -> float:
    """C: as near to 0 as overflow allows, because an exponent's rounding error grows with it."""
    return max(source.scale.item() - HEADROOM[source.dtype], 0.0)


def exponentials(x: Tensor, shift: float, out: Tensor) -> Tensor:
    """``exp(x - shift)``."""
    return torch.sub(x, shift, out=out).exp_() if shift else torch.exp(x, out=out)


def add(x: Tensor, number: int, rows: Tensor, cols: Tensor, strip: slice) -> None:
    """Add up a strip along both directions."""
    torch.sum(x, 1, out=rows[number, strip])
    cols[number] += x.sum(0)


def in_range(lse: Tensor, shift: float) -> bool:
    """Whether sums relative to the constant lost no term; not so where one is empty or NaN."""
    low, high = (x.item() - shift for x in lse.aminmax())
    return low >= LEAST[lse.dtype] and high <= MOST[lse.dtype]


def factors(
    sources: "Sequence[Product]", statistics: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Factor] | None:
    """What each matrix's exponentials are multiplied by; None where they would lose terms."""
    found = []
    for k, source in enumerate(sources):
        shift = constant(source)
        pair = []
        for i in (0, 1):
            lse = statistics[2 + i][k - 1, 0] if k else statistics[i][0]
            weight = -grads[2 + i][k - 1, 2] if k else grads[i][0]
            if not in_range(lse, shift):
                return None
            pair.append(weight * (shift - lse).exp())
        found.append(Factor(pair[0], pair[1], shift))
    return found


def backward(
    sources: "Sequence[Product]",
    strip: slice,
    z: Tensor,
    buffers: Sequence[Tensor],
    labels: Tensor,
    factors: Sequence[Factor],
    grads: Sequence[Tensor],
) -> Tensor:
    """The gradient of one strip's logits, in the first of two buffers."""
    height = strip.stop - strip.start
    g, work = (buffer[:height] for buffer in buffers)
    for k, (source, factor) in enumerate(zip(sources, factors, strict=True)):
        # in a buffer of their own: kept logits must not be overwritten
        e = exponentials(source.strip(strip, z), factor.constant, z[:height] if k else g)
        torch.add(factor.of_rows[strip, None], factor.of_cols, out=work)
        if k:
            g.addcmul_(e, work)
        else:
            g.mul_(work)
    inside = (labels[strip] >= 0) & (labels[strip] < z.shape[1])
    places = labels[strip].clamp(0, z.shape[1] - 1)
    wanted = grads[0][1, strip] + grads[1][1, places]
    kept = g.gather(1, places[:, None])[:, 0]
    g.scatter_(1, places[:, None], torch.where(inside, wanted, kept)[:, None])
    return g
