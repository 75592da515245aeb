# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity_rows``: a loss of softmaxes over rows, with its gradients in one sweep.

With ``Z = scale * query @ key.T`` (B x M), a teacher's ``T`` likewise, and l = labels_i,

    loss = 1/B sum_i [ hard * softplus(lse_{j != l} Z_ij - target_i) + soft * KL(q_i || p_i) ]
    target_i = scale cos(theta_il + margin),   p_i = softmax_j Z_ij,   q_i = softmax_j T_ij

Where nothing but rows counts, a strip of rows tells all about its rows, and so what the loss wants
of every logit of the strip while they are still there. The forward therefore goes on to the
gradients of query and key, strip by strip, up to one factor: the loss's upstream gradient. The op
``similarity`` cannot, because each of its statistics may get an upstream gradient of its own, and
those of the key's gradient are needed before the sum over rows.

Products: one a matrix and one a feature that needs a gradient, none in the backward: 3 instead of
4, with a teacher 4 instead of 6, with a teacher and constant keys 3 instead of 5.
Memory: strips; kept for the backward are float32 of the size of query and of key.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdengine.ops import _backend
from kdengine.ops.row_terms import want

# Each strip adds to the whole gradient of the key, 8 bytes a number. On a GPU strips lower than
# this spend more on that than the products cost which they save.
LEAST_ROWS = 256
# the lowest strip of a GPU's backend
STRIP_ROWS = 128


def applies(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    num_cols: int,
    num_teachers: int,
    margin: float,
    backend: str,
) -> bool:
    """Whether gradients should be made in the forward: needed, cheaper, and within the workspace.

    Args:
        query: (B, D).
        key: its rows may be a part of all.
        scale: 0-D.
        num_cols: M.
        num_teachers: more than one take the general way.
        margin: of the loss.
        backend: as asked for.
    """
    if not torch.is_grad_enabled() or num_teachers > 1:
        return False
    need_key = key.requires_grad
    if not need_key and not (num_teachers and (query.requires_grad or scale.requires_grad)):
        # without a teacher ``similarity`` needs no more for any upstream gradient
        return False
    limit = _backend.sum_bytes(query)
    if need_key and limit is not None and 4 * num_cols * key.shape[1] > limit:
        return False
    is_torch = _backend.name_of(backend) == "torch"
    dtype = torch.promote_types(query.dtype, key.dtype)
    if dtype == torch.float16 and margin and not is_torch:
        # the gradient at a positive has no bound, and a float16 strip needs one
        return False
    cell = 4 * (2 + 3 * num_teachers)
    if not is_torch:
        has_logits = num_teachers or dtype == torch.float16
        cell = dtype.itemsize + (4 * (1 + num_teachers) if has_logits else 0)
    rows = _backend.workspace(query) // (cell * num_cols)
    least = LEAST_ROWS if need_key else STRIP_ROWS
    whole = (len(query) + STRIP_ROWS - 1) // STRIP_ROWS * STRIP_ROWS
    return not query.is_cuda or rows >= min(whole, least)


def similarity_rows(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    *,
    teacher_query: Sequence[Tensor] = (),
    teacher_key: Sequence[Tensor] = (),
    teacher_scale: Tensor | None = None,
    hard: float,
    soft: float = 0.0,
    margin: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The loss at the head of this file.

    Shapes: query (B, D), key (M, D), scale 0-D, labels (B,) int64, where a number outside the
    matrix means "no positive"; at most one teacher: (B, E), (M, E), teacher_scale (1,). B and M at
    least 1; hard or soft not 0.
    Returns: 0-D, nats; float64 if any feature is, else float32. Infinite where ``hard`` is not 0
    and a row has no positive.
    Gradients: query, key and scale, in their dtypes; no second derivatives.
    Raises: RuntimeError for a backend that cannot run, and under ``create_graph=True``.
    """
    _backend.check_name("similarity_rows", backend)
    if teacher_scale is None:
        teacher_scale = scale.new_empty(0)
    enabled = torch.is_grad_enabled()
    loss, *_ = _forward(
        query,
        key,
        scale,
        labels,
        list(teacher_query),
        list(teacher_key),
        teacher_scale,
        float(hard),
        float(soft),
        float(margin),
        enabled and query.requires_grad,
        enabled and key.requires_grad,
        enabled and scale.requires_grad,
        backend,
    )
    return loss


@torch.library.custom_op("kdengine::similarity_rows", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    hard: float,
    soft: float,
    margin: float,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its rate by a cosine, sums of query's and key's gradients, gradient of scale."""
    tensors = [query, key, *teacher_query, *teacher_key]
    module = _backend.choose("similarity_rows", tensors, backend)
    dtype = _backend.statistics_dtype(*tensors)
    number = scale.to(dtype)
    # so that backends get weights of at most 1
    most = abs(hard) + abs(soft)
    inside = (labels >= 0) & (labels < len(key))
    losses, of_scale = (query.new_empty(len(query), dtype=dtype) for _ in range(2))

    def weigh(rows: slice, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = want(student, teacher, inside[rows], number, hard / most, soft / most, margin)
        losses[rows], of_scale[rows] = found.loss, found.scale
        return found.others, torch.where(inside[rows], found.positive, 0), found.teacher

    with _backend.running(query):
        left, right = module.forward(
            query,
            key,
            scale,
            labels,
            teacher_query,
            teacher_key,
            teacher_scale,
            weigh,
            need_query or need_scale,
            need_key,
            _backend.workspace(query),
        )
    mean = most / len(query)
    grad_scale = query.new_empty(0, dtype=dtype)
    if need_scale:
        # with z = scale * cosine the logits' share is the radial part of the features' gradient
        grad_scale = mean * ((left * query).sum() + of_scale.sum())
    if not need_query:
        left = left.new_empty(0, left.shape[1])
    return mean * losses.sum(), mean * number, left, right, grad_scale


@_forward.register_fake
def _forward_fake(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Tensor,
    hard: float,
    soft: float,
    margin: float,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _backend.statistics_dtype(query, key, *teacher_query, *teacher_key)
    width = query.shape[1]
    return (
        query.new_empty((), dtype=dtype),
        query.new_empty((), dtype=dtype),
        query.new_empty(query.shape[0] if need_query else 0, width, dtype=dtype),
        query.new_empty(key.shape[0] if need_key else 0, width, dtype=dtype),
        query.new_empty(() if need_scale else (0,), dtype=dtype),
    )


@torch.library.custom_op("kdengine::similarity_rows_backward", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * x``, rounded once, without a copy in the dtype of ``x`` on a GPU."""
    return torch.mul(x, factor, out=x.new_empty(x.shape, dtype=dtype))


@_scaled.register_fake
def _scaled_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.num_teachers = len(inputs[4])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple:
    _backend.refuse_create_graph("similarity_rows")
    rate, *sums = ctx.saved_tensors
    no_lists = [[None] * ctx.num_teachers, [None] * ctx.num_teachers]
    found: list[Tensor | None] = [None] * 3
    for i, need in enumerate(ctx.needs_input_grad[:3]):
        if need and grad is not None:
            found[i] = _scaled(sums[i], grad * rate if i < 2 else grad, ctx.dtypes[i])
    return (*found, None, *no_lists, *[None] * 8)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
