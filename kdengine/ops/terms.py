# SPDX-License-Identifier: Apache-2.0
"""The op ``terms``: what statistics of rows and columns amount to, in one launch each way.

The arithmetic of ``kdengine/losses/terms.py``, which is some hundred and fifty launches of torch on
a GPU: more than the kernels of a small batch take. It has no ``torch`` backend: there the losses do
it op by op.
"""

from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend
from kdengine.ops.similarity import Statistics


def has_terms(backend: str) -> bool:
    """Whether this op runs by that backend."""
    return ("terms", _backend.name_of(backend)) in _backend.MODULES


def terms(
    rows: Statistics | None,
    cols: Statistics | None,
    labels: tuple[Tensor, Tensor],
    limits: tuple[int, int],
    shares: tuple[float, float],
    *,
    hard: tuple[bool, bool],
    soft: tuple[bool, bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and divergences, and entropies of the teachers; a pair is of rows, columns.

    Args:
        rows: None for a side that is off.
        cols: likewise.
        labels: int64, of the rows and of the columns.
        limits: a label below 0, or from here on, names no positive.
        shares: factors of both sides' means.
        hard: which sides have a mean cross-entropy.
        soft: which have a mean divergence, over K teachers as well.
        backend: one for which ``has_terms``.

    Returns: the terms that are on, in the order hard rows, hard columns, soft rows, soft columns,
    (1..4,); entropies of the soft sides, constants, (0..2,). In the statistics' dtype, of which
    float64 is for ``cuda`` on the CPU alone.
    Gradients: others, positive and gap of both sides; first order only.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    vectors = [_vectors(*pair) for pair in zip((rows, cols), soft, strict=True)]
    values, entropies = _forward(
        *vectors, *labels, list(limits), list(shares), list(hard), list(soft), backend
    )
    return values, entropies.detach()


def _vectors(side: Statistics | None, soft: bool) -> list[Tensor]:
    """What the op reads of a side; no teacher where it has no use for them."""
    if side is None:
        return []
    teachers = [side.teacher_others, side.teacher_positive, side.gap, side.teacher_mean]
    return [side.others, side.positive, *(x if soft else x[:0] for x in teachers)]


@torch.library.custom_op("kdengine::terms_forward", mutates_args=())
def _forward(
    rows: list[Tensor],
    cols: list[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: list[int],
    shares: list[float],
    hard: list[bool],
    soft: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _backend.choose("terms", [*rows, *cols], backend)
    with _backend.running(labels):
        return module.forward(rows, cols, labels, col_labels, limits, shares, hard, soft)


@_forward.register_fake
def _forward_fake(
    rows: list[Tensor],
    cols: list[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: list[int],
    shares: list[float],
    hard: list[bool],
    soft: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    like = [*rows, *cols][0]
    return like.new_empty(sum(hard) + sum(soft)), like.new_empty(sum(soft))


@torch.library.custom_op("kdengine::terms_backward", mutates_args=())
def _backward(
    grads: Tensor,
    rows: list[Tensor],
    cols: list[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: list[int],
    shares: list[float],
    hard: list[bool],
    soft: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _backend.choose("terms", [*rows, *cols], backend)
    with _backend.running(labels):
        return module.backward(grads, rows, cols, labels, col_labels, limits, shares, hard, soft)


@_backward.register_fake
def _backward_fake(
    grads: Tensor,
    rows: list[Tensor],
    cols: list[Tensor],
    labels: Tensor,
    col_labels: Tensor,
    limits: list[int],
    shares: list[float],
    hard: list[bool],
    soft: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c = (grads.new_empty(rows[i].shape if rows else 0) for i in (0, 1, 4))
    d, e, f = (grads.new_empty(cols[i].shape if cols else 0) for i in (0, 1, 4))
    return a, b, c, d, e, f


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    rows, cols, labels, col_labels, *ctx.options = inputs
    ctx.save_for_backward(labels, col_labels, *rows, *cols)
    ctx.num_rows = len(rows)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: Tensor | None, _: None) -> tuple:
    _backend.refuse_create_graph("terms")
    labels, col_labels, *vectors = ctx.saved_tensors
    rows, cols = vectors[: ctx.num_rows], vectors[ctx.num_rows :]
    if grads is None:
        nothing = [[None] * len(rows), [None] * len(cols)]
        return (*nothing, *[None] * 7)
    found = _backward(grads, rows, cols, labels, col_labels, *ctx.options)
    sides = [
        [others, positive, None, None, gap if len(gap) else None, None] if x else []
        for x, others, positive, gap in ((rows, *found[:3]), (cols, *found[3:]))
    ]
    return (*sides, *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
