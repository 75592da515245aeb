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

Work: 4 products forward, 3 + 3 + 4 backward. Memory: O(N D) and strips. Over W ranks each does a
part of it, see ``gradient_blocks.py``.
Source: CLIP-KD eq. 13, 19-25; the closed form of the backward is checked against autograd.
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend
from kdengine.ops.gradient_blocks import Whole, backward, forward


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
    grad_query, grad_key, *_ = _forward(query, key, scale, backend)
    return grad_query, grad_key


@torch.library.custom_op("kdengine::gradient_forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(query, key, scale, Whole(), backend)


@_forward.register_fake
def _forward_fake(
    query: Tensor, key: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _backend.statistics_dtype(query, key)
    grad_query, grad_key = (x.new_empty(x.shape, dtype=dtype) for x in (query, key))
    rows, cols = (x.new_empty(2, len(x), dtype=dtype) for x in (query, key))
    return grad_query, grad_key, rows, cols


@torch.library.custom_op("kdengine::gradient_backward", mutates_args=())
def _backward(
    upstream_query: Tensor,
    upstream_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, grads = (upstream_query, upstream_key), (grad_query, grad_key)
    return backward(upstream, query, key, scale, rows, cols, grads, Whole(), backend)


@_backward.register_fake
def _backward_fake(
    upstream_query: Tensor,
    upstream_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), rows.new_empty(())


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    query, key, scale, ctx.backend = inputs
    grad_query, grad_key, rows, cols = output
    ctx.save_for_backward(query, key, scale, rows, cols, grad_query, grad_key)


def _differentiate(ctx: Any, upstream_query: Tensor, upstream_key: Tensor, *_: Tensor) -> tuple:
    _backend.refuse_create_graph("gradient")
    gradients = _backward(upstream_query, upstream_key, *ctx.saved_tensors, ctx.backend)
    needs = ctx.needs_input_grad[:3]
    scale = ctx.saved_tensors[2]
    found = [*gradients[:2], gradients[2].to(scale.dtype)]
    return (*(v if need else None for v, need in zip(found, needs, strict=True)), None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
