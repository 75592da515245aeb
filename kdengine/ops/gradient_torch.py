# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``gradient``: strips of rows, on any device."""

import torch
from torch import Tensor

from kdengine.ops.similarity_product import Product, cut


def backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    diagonals: Tensor,
    first: int,
    left: Tensor,
    right: Tensor,
    half: float,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of G and dA, see ``kdengine.ops.gradient``; a block of rows.

    Args:
        query: x (B, D).
        key: y (M, D).
        scale: 0-D.
        rows: (2, B), log-sum-exp and mean of H.
        cols: (2, M), the same.
        diagonals: (2, B), what stands in G and in dA at row i's positive, column first + i.
        first: column of the first row's positive.
        left: u (B, D).
        right: r (M, D).
        half: factor of H = half (u y^T + x r^T).
        budget: bytes of the strips.

    Returns: G r, dA y, G^T u, dA^T x.
    """
    x, y, u, r = (v.to(rows.dtype) for v in (query, key, left, right))
    logits = Product(x, y, scale, rows.dtype, budget)
    wide_left, wide_right = torch.cat([u, x], 1), torch.cat([y, r], 1)
    strips, z = cut(logits, budget)
    h, p = torch.empty_like(z), torch.empty_like(z)
    g_r, a_y, g_u, a_x = (torch.zeros_like(v) for v in (x, x, y, y))
    for strip in strips:
        count = strip.stop - strip.start
        here = slice(count)
        number = torch.arange(count, device=z.device)
        positives = number, number + (first + strip.start)
        own = rows[:, strip, None]
        logits.strip(strip, z)
        torch.mm(wide_left[strip], wide_right.mT, out=h[here]).mul_(half)
        row_p = torch.sub(z[here], own[0], out=p[here]).exp_()
        col_p = z[here].sub_(cols[0]).exp_()
        # dA = 1/2 P (H - row mean) + 1/2 Q (H - column mean)
        a = row_p * (h[here] - own[1])
        a.addcmul_(col_p, h[here].sub_(cols[1])).div_(2)
        g = row_p.add_(col_p).div_(2)
        g[positives], a[positives] = diagonals[0, strip], diagonals[1, strip]
        torch.mm(g, r, out=g_r[strip])
        torch.mm(a, y, out=a_y[strip])
        g_u.addmm_(g.mT, u[strip])
        a_x.addmm_(a.mT, x[strip])
    return g_r, a_y, g_u, a_x
