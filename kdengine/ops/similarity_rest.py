# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity_rest``: log-sum-exps of rows without some columns, and those columns' logits.

With ``z = scale * query @ key.T``, never stored, and m columns C_i of each row:

    rest    lse_{j not in C_i} z_ij
    logits  z_ij of the columns in C_i

Both are made of the same strips, and the rest is a sum of what it consists of. Taken off the sum of
a whole row it would be lost where the named columns hold nearly all of that, which is what a
student learns. What else a loss wants of a row follows by adding named columns to the rest again.

Cost: 4 products, one of them in the forward. Strips of torch on any device; a column of a row has
to be looked up among m, for which no fused kernel has been written.
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend


def similarity_rest(
    query: Tensor, key: Tensor, scale: Tensor, columns: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``rest`` and ``logits``, see the head of this file.

    Shapes: query (B, D), key (M, D), scale 0-D, columns (B, m) int64, different numbers in a row,
    where one outside the matrix names nothing. Returns: (B,), -inf where nothing is left, and
    (B, m), 0 where nothing is named; in nats, float64 if a feature is, else float32.
    Gradients: query, key and scale, in their dtypes; no second derivatives.
    Memory: results, a bounded workspace, see ``set_workspace``, and the float32 gradient of key.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("similarity_rest", backend)
    return _forward(query, key, scale, columns, backend)


@torch.library.custom_op("kdengine::similarity_rest", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, scale: Tensor, columns: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    module = _backend.choose("similarity_rest", [query, key], backend)
    with _backend.running(query):
        return module.forward(query, key, scale, columns, _backend.workspace(query))


@_forward.register_fake
def _forward_fake(
    query: Tensor, key: Tensor, scale: Tensor, columns: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = _backend.statistics_dtype(query, key)
    return query.new_empty(len(query), dtype=dtype), query.new_empty(columns.shape, dtype=dtype)


@torch.library.custom_op("kdengine::similarity_rest_backward", mutates_args=())
def _backward(
    grad_rest: Tensor,
    grad_logits: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    columns: Tensor,
    rest: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _backend.choose("similarity_rest", [query, key], backend)
    given = grad_rest, grad_logits, query, key, scale, columns, rest
    with _backend.running(query):
        found = module.backward(*given, _backend.workspace(query))
    return tuple(x.to(like.dtype) for x, like in zip(found, (query, key, scale), strict=True))


@_backward.register_fake
def _backward_fake(
    grad_rest: Tensor,
    grad_logits: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    columns: Tensor,
    rest: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _differentiate(ctx: Any, grad_rest: Tensor, grad_logits: Tensor) -> tuple:
    _backend.refuse_create_graph("similarity_rest")
    found = _backward(grad_rest, grad_logits, *ctx.saved_tensors, ctx.backend)
    needed = zip(found, ctx.needs_input_grad, strict=False)
    return (*(x if need else None for x, need in needed), None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
