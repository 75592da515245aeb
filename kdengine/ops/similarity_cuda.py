# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of ``similarity``: ``csrc/similarity.h``, on GPUs and, in C++, on the CPU.

The forward makes every tile once and keeps O(B + M) numbers. The backward makes the tiles again, a
strip of rows at a time: one kernel writes the gradient of the strip's logits, rounded once, and the
library multiplies it into the gradients of both features, in float32.

A tile whose sums leave the range of the shared shift takes its own maxima at once, so neither sweep
is ever repeated and no flag is needed.

Products of B x M x width: one a matrix in the forward; in the backward one a matrix and one for
each feature that needs a gradient. Rows against constant keys take three in all.
Workspace: partial sums, then the strip; never B x M.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdengine.ops import extension
from kdengine.ops._backend import statistics_dtype
from kdengine_kernels.library import (
    TILE,
    add_product,
    multiply,
    new_strip,
    operand,
    strip_height,
)


class Logits(NamedTuple):
    """A matrix ``scale * left @ right.T``, as the extension takes it."""

    left: Tensor
    right: Tensor
    scale: Tensor

    def rows(self, part: slice) -> "Logits":
        """Some of its rows."""
        return Logits(self.left[part], self.right, self.scale)


class Term(NamedTuple):
    """A matrix and what its rows and columns pull: (3, n) each, or empty.

    The three are log-sum-exps, weights, and what is wanted at the positives.
    """

    logits: Logits
    of_rows: Tensor
    of_cols: Tensor


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    on_rows: bool,
    on_cols: bool,
    soft_rows: bool,
    soft_cols: bool,
    means: bool,
    attend: bool,
    keep: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of rows, columns and teachers; see ``kdengine.ops.similarity``."""
    student, *teachers = _matrices(query, key, scale, teacher_query, teacher_key, teacher_scale)
    num_rows, num_cols, count = len(query), len(key), len(teachers)

    def new(*shape: int) -> Tensor:
        # a positive is written only where there is one
        return student.scale.new_zeros(shape)

    row_stats = new(2 + means, num_rows if on_rows else 0)
    col_stats = new(2 + means, num_cols if on_cols else 0)
    teacher_rows = new(count if soft_rows else 0, 4, num_rows if soft_rows else 0)
    teacher_cols = new(count if soft_cols else 0, 4, num_cols if soft_cols else 0)
    both = (labels.int(), col_labels.int())
    none = new(0)
    # the student's own statistics come with the first sweep
    for k, teacher in enumerate(teachers if soft_rows or soft_cols else [None]):
        outs = [
            none if k else row_stats,
            none if k else col_stats,
            teacher_rows[k] if soft_rows else none,
            teacher_cols[k] if soft_cols else none,
        ]
        _sweep(_alike([student, teacher]) if teacher else [student], both, outs, budget)
    attended = new(num_rows if attend else 0, key.shape[1])
    if attend:
        pull = torch.stack([row_stats[0], torch.ones_like(row_stats[0]), new(num_rows)])
        # exponentials leave the range of float16
        unit = new(1).add_(4096.0 if student.left.dtype == torch.float16 else 1.0)
        for part, strip in _strips([Term(student, pull, none)], both, unit, budget):
            # so that rounding a row's only large probability costs nothing
            total = strip.sum(1, keepdim=True, dtype=attended.dtype)
            pulled = multiply(strip, student.right) / torch.where(total == 0, 1.0, total)
            attended[part] = pulled[:, : key.shape[1]]
    return row_stats, col_stats, teacher_rows, teacher_cols, attended, new(0, num_rows, num_cols)


def backward(
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    col_labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    statistics: Sequence[Tensor],
    logits: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; one that is not needed is empty."""
    matrices = _matrices(query, key, scale, teacher_query, teacher_key, teacher_scale)
    student = matrices[0]
    left, right, factor = student
    terms = _terms(matrices, grads, statistics)
    unit = torch.ones_like(factor)
    if left.dtype == torch.float16:
        # its least number is 6e-8, and the gradient of a logit is about a probability over B
        largest = [x[1:].abs().amax() for term in terms for x in term[1:] if x.numel()]
        unit = 4096 / torch.stack(largest).amax().clamp(min=1e-30).reshape(1)
    grad_query = torch.empty_like(query if need_query else query[:0, :0])
    total = torch.zeros_like(right if need_key else right[:0], dtype=factor.dtype)
    grad_scale = factor.new_zeros(())
    for part, strip in _strips(terms, (labels.int(), col_labels.int()), unit, budget):
        if need_query or need_scale:
            pulled = multiply(strip, right) / unit
            # with z = scale * cosine it is the radial part of the features' gradient
            grad_scale += (pulled * left[part]).sum()
            if need_query:
                grad_query[part] = (pulled * factor)[:, : query.shape[1]]
        if need_key:
            add_product(total, strip.mT, left[part])
    grad_key = total.mul_(factor / unit)[:, : key.shape[1]].to(key.dtype).contiguous()
    return (
        grad_query if need_query else query.new_empty(0),
        grad_key if need_key else key.new_empty(0),
        grad_scale.to(scale.dtype) if need_scale else scale.new_empty(0),
    )


def _matrices(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
) -> list[Logits]:
    """The student's matrix, then those of the teachers."""
    real = statistics_dtype(query, key, *teacher_query, *teacher_key)
    found: list[Logits] = []
    pairs = [(query, key, scale), *zip(teacher_query, teacher_key, teacher_scale, strict=True)]
    for left, right, number in pairs:
        dtype = torch.promote_types(left.dtype, right.dtype)
        if real == torch.float64:
            dtype = real
        left, right = (operand(x.detach().to(dtype)) for x in (left, right))
        found.append(Logits(left, right, number.detach().reshape(1).to(real)))
    return found


def _alike(matrices: list[Logits]) -> list[Logits]:
    """Of one dtype, as a kernel over two matrices needs them: float32 where dtypes differ."""
    if len({x.left.dtype for x in matrices}) == 1:
        return matrices
    return [Logits(operand(x.float()), operand(y.float()), s) for x, y, s in matrices]


def _sweep(
    matrices: Sequence[Logits], labels: tuple[Tensor, Tensor], outs: Sequence[Tensor], budget: int
) -> None:
    """Fill the statistics of four sides; ``budget`` bounds the bytes of the partial sums."""
    num_rows, num_cols = len(matrices[0].left), len(matrices[0].right)
    # of an item, by rows and by columns
    slots = [sum(x.shape[0] for x in outs[i::2] if x.numel()) for i in (0, 1)]
    col_tiles = -(-num_cols // TILE)
    row_bytes = outs[0].itemsize * (slots[0] * (1 + col_tiles) + slots[1] * num_cols / TILE)
    height = max(1, int(budget / row_bytes / TILE)) * TILE
    row_tiles = -(-min(height, num_rows) // TILE)

    def new(out: Tensor, num_parts: int, size: int) -> Tensor:
        return out.new_empty(out.shape[0] * (1 + num_parts), size) if out.numel() else out

    of_rows = [new(x, col_tiles, min(height, num_rows)) for x in outs[::2]]
    of_cols = [new(x, row_tiles, num_cols) for x in outs[1::2]]
    for first in range(0, num_rows, height):
        part = slice(first, min(first + height, num_rows))
        size = part.stop - first
        row_parts = [x[:, :size] if x.numel() else x for x in of_rows]
        col_parts = [
            x[: out.shape[0] * (1 + -(-size // TILE))] if x.numel() else x
            for x, out in zip(of_cols, outs[1::2], strict=True)
        ]
        parts = [row_parts[0], col_parts[0], row_parts[1], col_parts[1]]
        here = [x[:, part] if i % 2 == 0 and x.numel() else x for i, x in enumerate(outs)]
        strips = [x for matrix in matrices for x in matrix.rows(part)]
        # labels outside the strip name no cell of it
        own = [labels[0][part], labels[1] - first]
        extension.call("similarity_statistics", strips, own, parts, here)
        extension.call("similarity_finalise", parts, here, first == 0)


def _terms(
    matrices: Sequence[Logits], grads: Sequence[Tensor], statistics: Sequence[Tensor]
) -> list[Term]:
    """What pulls in the backward: the student, then teachers of sides that are on."""

    def pull(lse: Tensor, weight: Tensor, positive: Tensor) -> Tensor:
        return torch.stack([x.to(lse.dtype) for x in (lse, weight, positive)])

    def student(i: int) -> Tensor:
        x, grad = statistics[i], grads[i]
        return pull(x[0], grad[0], grad[1])

    def teacher(i: int, k: int) -> Tensor:
        x, grad = statistics[2 + i], grads[2 + i]
        if not len(x):
            return statistics[i].new_empty(0)
        return pull(x[k, 0], -grad[k, 2], torch.zeros_like(x[k, 0]))

    terms = [Term(matrices[0], student(0), student(1))]
    if any(len(x) for x in statistics[2:]):
        terms += [Term(x, teacher(0, k), teacher(1, k)) for k, x in enumerate(matrices[1:])]
    return terms


def _strips(
    terms: Sequence[Term], labels: tuple[Tensor, Tensor], unit: Tensor, budget: int
) -> Iterator[tuple[slice, Tensor]]:
    """Strip by strip: its rows, and ``unit`` times the gradient of their logits.

    The last launch takes the student and a teacher of its dtype. What other teachers pull comes
    before, summed in the statistics' dtype.
    """
    left, right, scale = terms[0].logits
    num_cols = len(right)
    last = [terms[0], *[x for x in terms[1:] if x.logits.left.dtype == left.dtype][:1]]
    batches = [*([x] for x in terms if all(x is not y for y in last)), last]
    itemsize = left.itemsize + scale.itemsize * (len(batches) > 1)
    processors = _num_processors(left.device)
    height = min(len(left), strip_height(left, num_cols, itemsize, budget, processors))
    whole = new_strip(left, height, num_cols)
    sums = new_strip(scale, height if len(batches) > 1 else 0, num_cols)
    one = torch.ones_like(scale)
    for first in range(0, len(left), height):
        part = slice(first, min(first + height, len(left)))
        strip, handed_on = whole[: part.stop - first], sums[: part.stop - first]
        residual = sums[:0]
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            extension.call(
                "similarity_gradient",
                [x for term in batch for x in term.logits.rows(part)],
                [labels[0][part], labels[1] - first],
                [
                    x
                    for _, rows, cols in batch
                    for x in (rows[:, part] if rows.numel() else rows, cols)
                ],
                residual,
                unit if is_last else one,
                strip if is_last else handed_on,
            )
            residual = handed_on
        yield part, strip


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
