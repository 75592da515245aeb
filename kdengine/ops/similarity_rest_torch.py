# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``similarity_rest``: strips of rows, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdengine.ops.similarity_product import Product, cut, products

# the logits of a strip, and what is made of them
NUM_BUFFERS = 2
Places = Callable[[slice], tuple[Tensor, Tensor]]


def forward(
    query: Tensor, key: Tensor, scale: Tensor, columns: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """The rest of each row, and the logits of its named columns."""
    product, strips, z, places = _begin(query, key, scale, columns, budget)
    rest, logits = z.new_empty(len(query)), z.new_empty(columns.shape)
    for rows in strips:
        strip = product.strip(rows, z)
        here, place = places(rows)
        logits[rows] = strip.gather(1, place).masked_fill_(~here, 0)
        _lower(strip, here, place, -torch.inf)
        rest[rows] = strip.logsumexp(1)
    return rest, logits


def backward(
    grad_rest: Tensor,
    grad_logits: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    columns: Tensor,
    rest: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale, in float32 at least."""
    product, strips, z, places = _begin(query, key, scale, columns, budget)
    number = scale.to(z.dtype)
    by_query = z.new_empty(query.shape)
    by_key, by_scale = z.new_zeros(key.shape), torch.zeros_like(number)
    # where nothing is left, no column is
    total = rest.masked_fill(rest == -torch.inf, torch.inf)
    for rows in strips:
        g = product.strip(rows, z).sub_(total[rows, None]).exp_()
        here, place = places(rows)
        _lower(g, here, place, 0.0)
        g.mul_(grad_rest[rows, None])
        g.scatter_add_(1, place, grad_logits[rows].masked_fill(~here, 0))
        left = query[rows].to(z.dtype)
        pulled = product.pull(g, by_query[rows])
        by_scale += (pulled * left).sum()
        by_key.addmm_(g.mT, left)
    return by_query.mul_(number), by_key.mul_(number), by_scale


def _begin(
    query: Tensor, key: Tensor, scale: Tensor, columns: Tensor, budget: int
) -> tuple[Product, list[slice], Tensor, Places]:
    """The product, its strips, a buffer for one, and where the columns of some rows are."""
    (product,) = products(query, key, scale, (), (), scale.new_empty(0), budget)
    strips, z = cut(product, budget, NUM_BUFFERS)

    def places(rows: slice) -> tuple[Tensor, Tensor]:
        own = columns[rows]
        here = (own >= 0) & (own < len(key))
        return here, own.where(here, 0)

    return product, strips, z, places


def _lower(strip: Tensor, here: Tensor, place: Tensor, value: float) -> None:
    """Set named cells to a value that none is below; those named elsewhere stay what they are."""
    bound = torch.full_like(place, torch.inf, dtype=strip.dtype).masked_fill_(here, value)
    strip.scatter_reduce_(1, place, bound, "amin")
