# SPDX-License-Identifier: Apache-2.0
"""The op ``gradient``: the gradients of InfoNCE at its embeddings, themselves differentiable.

With ``Z = scale x y^T`` (N x N), P its row softmax, Q its column softmax:

    G = 1/2 (P - I) + 1/2 (Q - I),   g_x = scale/N G y,   g_y = scale/N G^T x

The forward is a statistics sweep and gradient strips of the op ``similarity``. The backward, for
upstream gradients u of g_x and r of g_y, needs no second differentiation by autograd:

    H   = u y^T + x r^T
    dA  = 1/2 P (H - rowsum(P H)) + 1/2 Q (H - colsum(Q H))        elementwise, times scale/N
    dx  = scale/N G r + scale dA y,   dy = scale/N G^T u + scale dA^T x
    dscale = <dA, x y^T> + (<u, g_x> + <r, g_y>) / scale

H is a product of width 2 D, ``[u x] [y r]^T``, and its means under P and Q are what ``similarity``
calls a student's gap to a teacher: one more sweep. G and dA are written in strips. Nothing of size
N x N is stored, nor N x N x D as in the released CLIP-KD code.

Work: 4 products forward, 3 + 3 + 4 backward. Memory: O(N D) and strips.
Source: CLIP-KD eq. 13, 19-25; the closed form of the backward is checked against autograd.
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend

# logits of H are scaled to at most this: far above float32's noise in the teacher's logits
LARGEST = 20.0


def gradient(
    query: Tensor, key: Tensor, scale: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Gradients of InfoNCE with respect to query and key.

    Shapes: query, key (N, D), L2-normalised rows; scale 0-D.
    Returns: (N, D) twice; float64 if a feature is, else float32.
    Gradients: query, key and scale, in their dtypes; first order only (of these gradients).
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("gradient", backend)
    grad_query, grad_key, _ = _forward(query, key, scale, backend)
    return grad_query, grad_key


@torch.library.custom_op("kdengine::gradient_forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    similarity = _backend.choose("similarity", [query, key], backend)
    num_rows, dtype = len(query), _backend.statistics_dtype(query, key)
    labels, none = torch.arange(num_rows, device=query.device), query.new_empty(0)
    with _backend.running(query):
        stats = similarity.forward(
            *(query, key, scale, labels, labels, [], [], none),
            *(True, True, False, False, False, False, False, _backend.workspace(query)),
        )[:4]
        # N times the gradient of the loss, which float16 can hold
        outside = [(x[0] - x[1]).sigmoid() / 2 for x in stats[:2]]
        grads = [torch.stack([x, -x]) for x in outside] + [torch.zeros_like(x) for x in stats[2:]]
        grad_query, grad_key, _ = similarity.backward(
            *(grads, query, key, scale, labels, labels, [], [], none, stats, none),
            *(True, True, False, _backend.workspace(query)),
        )
    return (
        grad_query.to(dtype) / num_rows,
        grad_key.to(dtype) / num_rows,
        torch.cat([stats[0], stats[1]]),
    )


@_forward.register_fake
def _forward_fake(
    query: Tensor, key: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _backend.statistics_dtype(query, key)
    stats = query.new_empty(4, len(query), dtype=dtype)
    return query.new_empty(query.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype), stats


@torch.library.custom_op("kdengine::gradient_backward", mutates_args=())
def _backward(
    upstream_query: Tensor,
    upstream_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    stats: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = stats.dtype
    # products of gradients leave the range of float16
    x, y = (v.float() if v.dtype == torch.float16 else v for v in (query, key))
    u, r = upstream_query.to(dtype), upstream_key.to(dtype)
    # to lengths of at most 1, whatever the upstream gradient
    size = torch.maximum(u.norm(dim=1).amax(), r.norm(dim=1).amax()).clamp(min=1e-30)
    u, r = u / size, r / size
    module = _backend.choose("gradient", [query, key], backend)
    with _backend.running(query):
        pulls = _pulls(x, y, scale, stats, u, r, backend)
        parts = module.backward(
            x, y, scale, pulls, u.to(x.dtype), r.to(y.dtype), LARGEST / 2, _backend.workspace(x)
        )
    g_r, a_y, g_u, a_x = parts
    scale = scale.to(dtype)
    rate = scale / len(query) * size
    # the strips hold H times LARGEST / 2
    a_y, a_x = (rate / (LARGEST / 2) * v for v in (a_y, a_x))
    found_query, found_key = rate * g_r + scale * a_y, rate * g_u + scale * a_x
    through_g = size * ((u * grad_query).sum() + (r * grad_key).sum()) / scale
    found_scale = (a_y * query).sum() + through_g
    return found_query.to(query.dtype), found_key.to(key.dtype), found_scale.to(stats.dtype)


@_backward.register_fake
def _backward_fake(
    upstream_query: Tensor,
    upstream_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    stats: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), stats.new_empty(())


def _pulls(
    x: Tensor, y: Tensor, scale: Tensor, stats: Tensor, u: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """For rows and columns (4, N): log-sum-exp, mean of H, diagonals of G and of dA.

    H is scaled by LARGEST / 2. With p the probability of the positive and m the mean of H over the
    others: rowsum(P H) = (1 - p) m + p H_ii, and H_ii minus that is (1 - p) (H_ii - m).
    """
    similarity = _backend.choose("similarity", [x, y], backend)
    num_rows, half = len(x), LARGEST / 2
    labels = torch.arange(num_rows, device=x.device)
    left, right = torch.cat([u.to(x.dtype), x], 1), torch.cat([y, r.to(y.dtype)], 1)
    soft = similarity.forward(
        *(left, right, scale.new_full((), half), labels, labels, [x], [y], scale.reshape(1)),
        *(False, False, True, True, False, False, False, _backend.workspace(x)),
    )[2:4]
    diagonal = half * ((u * y).sum(1) + (x * r).sum(1))
    found = []
    for others, positive, side in zip(stats[::2], stats[1::2], soft, strict=True):
        outside = (others - positive).sigmoid()
        mean = side[0, 3] - side[0, 2]
        # a row without others has neither
        mean = torch.where(others > -torch.inf, mean, 0)
        whole = torch.logaddexp(others, positive)
        total = outside * mean + (1 - outside) * diagonal
        pulled = (1 - outside) * outside * (diagonal - mean)
        found.append(torch.stack([whole, total, -outside / 2, pulled / 2]))
    return found[0], found[1]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    query, key, scale, ctx.backend = inputs
    grad_query, grad_key, stats = output
    ctx.save_for_backward(query, key, scale, stats, grad_query, grad_key)


def _differentiate(ctx: Any, upstream_query: Tensor, upstream_key: Tensor, _: Tensor) -> tuple:
    _backend.refuse_create_graph("gradient")
    gradients = _backward(upstream_query, upstream_key, *ctx.saved_tensors, ctx.backend)
    needs = ctx.needs_input_grad[:3]
    scale = ctx.saved_tensors[2]
    found = [*gradients[:2], gradients[2].to(scale.dtype)]
    return (*(v if need else None for v, need in zip(found, needs, strict=True)), None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
