# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity``: log-sum-exps over a similarity matrix that is never stored.

With ``Z = scale * query @ key.T`` (B x M) and, for each teacher, ``T`` likewise, one sweep gives
for every row i and every column j a few numbers, from which every relational loss follows by
arithmetic on vectors (``kdengine/losses``). For row i with positive l = labels_i, for instance:

    others    lse_{j != l} Z_ij                 -log p_l = softplus(others - positive)
    positive  Z_il, 0 without a positive
    gap       sum_{j != l} q_j (T_ij - Z_ij)    q = softmax_{j != l} T_ij
    mean      sum_{j != l} w_j Z_ij             w = softmax of the matrix the mean belongs to

Their gradients are exact and independent, so a loss may weigh, merge over ranks, or replace any
of them (a margin changes ``positive``). Where only the rows count and keys are constants, the
forward also keeps ``attended_i = sum_{j != l} p_ij key_j``, all that the gradients need: two
products instead of three. A loss of rows alone that is one number takes ``similarity_rows``, which
makes gradients in the forward. Sums without the positive keep small probabilities exact:
1 - p_l is computed as p's sum over the others, never as a difference from 1.

Memory: O(B + M) statistics and a few strips of the matrix, in the forward and in the backward.
Where all logits fit into half of the workspace, the ``torch`` backend keeps them for the backward
instead of making them again: a third of the work of a matrix.
The backend is chosen at call time (``_backend.py``); each is a pair of plain functions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdengine.ops import _backend, similarity_blocks

# Logits that fill at most this part of the workspace are kept from the forward to the backward, and
# strips get the rest. On a CPU that is 2048 x 2048 in float32, where it saves a quarter of the time
# of InfoNCE; without it a dense loss is faster up to there.
KEPT_SHARE = 2


class Statistics(NamedTuple):
    """What one side (the rows, or the columns) of the matrix is reduced to.

    Student: vectors (n,). Teachers: (K, n), constants except ``gap``. ``mean`` is a constant.
    """

    others: Tensor
    positive: Tensor
    mean: Tensor
    teacher_others: Tensor
    teacher_positive: Tensor
    gap: Tensor
    teacher_mean: Tensor


def similarity(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    *,
    teacher_query: Sequence[Tensor] = (),
    teacher_key: Sequence[Tensor] = (),
    teacher_scale: Tensor | None = None,
    rows: bool = True,
    cols: bool = True,
    soft_rows: bool = False,
    soft_cols: bool = False,
    means: bool = False,
    backend: str = "auto",
) -> tuple[Statistics | None, Statistics | None]:
    """Statistics of the rows and of the columns; None for a side that is switched off.

    Shapes: query (B, D), key (M, D), scale 0-D, labels (B,) and col_labels (M,) int64, where a
    number outside the matrix means "no positive"; K teachers (B, E_k), (M, E_k), teacher_scale
    (K,). B and M at least 1.
    Returns: ``Statistics`` in nats, float64 if any feature is, else float32. ``mean`` holds
    numbers only with ``means=True``, the teachers' fields only on soft sides.
    Gradients: query, key and scale, in their dtypes; no second derivatives.
    Memory: O(B + M) results and a bounded workspace, see ``set_workspace``.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("similarity", backend)
    if teacher_scale is None:
        teacher_scale = scale.new_empty(0)
    soft = len(teacher_query) > 0 and (soft_rows or soft_cols)
    is_constant = not (key.requires_grad and torch.is_grad_enabled())
    needs_gradient = (query.requires_grad or scale.requires_grad) and torch.is_grad_enabled()
    attend = rows and needs_gradient and is_constant and not (cols or soft or means)
    keep = (
        (needs_gradient or not is_constant)
        and not attend
        and keeps_logits(query, len(key), teacher_query if soft else (), backend)
    )
    row_stats, col_stats, teacher_rows, teacher_cols, _, _ = _forward(
        query,
        key,
        scale,
        labels,
        col_labels,
        list(teacher_query),
        list(teacher_key),
        teacher_scale,
        rows,
        cols,
        soft_rows,
        soft_cols,
        means,
        attend,
        keep,
        backend,
    )
    return (
        _unpack(row_stats, teacher_rows, means) if rows else None,
        _unpack(col_stats, teacher_cols, means) if cols else None,
    )


def keeps_logits(
    query: Tensor, num_cols: int, teacher_query: Sequence[Tensor], backend: str
) -> bool:
    """Whether the logits of all matrices are few enough to be kept for the backward."""
    itemsize = _backend.statistics_dtype(query, *teacher_query).itemsize
    num_bytes = (1 + len(teacher_query)) * len(query) * num_cols * itemsize
    limit = _backend.workspace(query) // KEPT_SHARE
    return _backend.name_of(backend) == "torch" and num_bytes <= limit


def _unpack(student: Tensor, teachers: Tensor, means: bool) -> Statistics:
    constant = teachers.detach()
    # at once: a gradient of each alone would be three launches
    others, positive, *mean = student.unbind()
    return Statistics(
        others=others,
        positive=positive,
        mean=mean[0].detach() if means else student.new_empty(0),
        teacher_others=constant[:, 0],
        teacher_positive=constant[:, 1],
        gap=teachers[:, 2],
        teacher_mean=constant[:, 3],
    )


@torch.library.custom_op("kdengine::similarity_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    rows: bool,
    cols: bool,
    soft_rows: bool,
    soft_cols: bool,
    means: bool,
    attend: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _backend.choose("similarity", [query, key, *teacher_query, *teacher_key], backend)
    with _backend.running(query):
        return module.forward(
            query,
            key,
            scale,
            labels,
            col_labels,
            teacher_query,
            teacher_key,
            teacher_scale,
            rows,
            cols,
            soft_rows,
            soft_cols,
            means,
            attend,
            keep,
            _backend.workspace(query),
        )


@_forward.register_fake
def _forward_fake(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    rows: bool,
    cols: bool,
    soft_rows: bool,
    soft_cols: bool,
    means: bool,
    attend: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _backend.statistics_dtype(query, key, *teacher_query, *teacher_key)
    num_rows, num_cols = query.shape[0], key.shape[0]
    count = len(teacher_query)
    num_matrices = 1 + (count if soft_rows or soft_cols else 0)

    def student(on: bool, size: int) -> Tensor:
        return query.new_empty(2 + means, size if on else 0, dtype=dtype)

    def teachers(on: bool, size: int) -> Tensor:
        return query.new_empty(count if on else 0, 4, size if on else 0, dtype=dtype)

    return (
        student(rows, num_rows),
        student(cols, num_cols),
        teachers(soft_rows, num_rows),
        teachers(soft_cols, num_cols),
        query.new_empty(num_rows if attend else 0, key.shape[1], dtype=dtype),
        query.new_empty(num_matrices if keep else 0, num_rows, num_cols, dtype=dtype),
    )


@torch.library.custom_op("kdengine::similarity_backward", mutates_args=())
def _backward(
    grads: list[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    statistics: list[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _backend.choose("similarity", [query, key, *teacher_query, *teacher_key], backend)
    with _backend.running(query):
        return similarity_blocks.backward(
            module,
            grads,
            query,
            key,
            scale,
            labels,
            col_labels,
            teacher_query,
            teacher_key,
            teacher_scale,
            statistics,
            logits,
            need_query,
            need_key,
            need_scale,
            _backend.workspace(query),
            _backend.sum_bytes(query),
        )


@_backward.register_fake
def _backward_fake(
    grads: list[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    statistics: list[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
        scale.new_empty(() if need_scale else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *features, teacher_query, teacher_key, teacher_scale = inputs[:8]
    ctx.save_for_backward(*features, teacher_scale, *output, *teacher_query, *teacher_key)
    ctx.attend, _, ctx.backend = inputs[-3:]
    # else unused outputs, kept logits among them, get zeros of their size
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple:
    _backend.refuse_create_graph("similarity")
    query, key, scale, labels, col_labels, teacher_scale, *rest = ctx.saved_tensors
    statistics, attended, logits, teachers = rest[:4], rest[4], rest[5], rest[6:]
    num_teachers = len(teachers) // 2
    no_lists = [[None] * num_teachers, [None] * num_teachers]
    needs = ctx.needs_input_grad[:3]
    wanted = [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(statistics, grads[:4], strict=True)
    ]
    if ctx.attend:
        named = named_rows(key, labels, attended.dtype)
        pair = attended_gradients(wanted[0], query, scale, attended, named)
        found = [x if need else None for x, need in zip(pair, needs, strict=True)]
        return (*found, None, None, *no_lists, *[None] * 9)
    gradients = _backward(
        wanted,
        query,
        key,
        scale,
        labels,
        col_labels,
        teachers[:num_teachers],
        teachers[num_teachers:],
        teacher_scale,
        statistics,
        logits,
        *needs,
        ctx.backend,
    )
    found = [x if need else None for x, need in zip(gradients, needs, strict=True)]
    return (*found, None, None, *no_lists, *[None] * 9)


def named_rows(key: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's positive; 0 for a row whose label names no key."""
    inside = (labels >= 0) & (labels < len(key))
    return key[torch.where(inside, labels, 0)].to(dtype) * inside[:, None]


def attended_gradients(
    grad: Tensor, query: Tensor, scale: Tensor, attended: Tensor, named: Tensor
) -> tuple[Tensor, None, Tensor]:
    """Gradients of query and scale where the keys are constants: no logit is needed again."""
    pull = grad[0, :, None] * attended
    pull += grad[1, :, None] * named
    grad_scale = (pull * query).sum().to(scale.dtype)
    return (pull * scale).to(query.dtype), None, grad_scale


_forward.register_autograd(_differentiate, setup_context=_setup_context)
