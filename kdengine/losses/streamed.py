# SPDX-License-Identifier: Apache-2.0
"""``similarity`` of this rank's queries and all ranks' keys, block by block as keys arrive.

Forward: statistics of each block of columns, its own first; those of rows are merged over blocks,
those of columns are parts that say what this rank's rows know of every rank's keys. Backward: each
block again, with the statistics of whole rows; gradients of the queries add up here, those of a
block's keys leave for home while the next block is computed, the own block last. Each logit of the
b x N block is made as often as without blocks.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdengine.distributed import AHEAD, Block, Exchange
from kdengine.losses import merging
from kdengine.losses.inputs import Features
from kdengine.ops import Statistics
from kdengine.ops._backend import refuse_create_graph
from kdengine.ops.similarity import attended_gradients, keeps_logits, named_rows


class Plan(NamedTuple):
    """Everything but the tensors that get a gradient.

    Attributes:
        exchange: of the keys.
        features: detached.
        labels: global numbers of the queries' positives.
        col_labels: of this rank's keys; None where key j is query j's.
        first_row: global number of this rank's first query.
        sides: rows, cols, soft rows, soft cols.
        means: wanted as well.
        attend: keep what the gradients need of constant keys, instead of the keys.
        keep: keep the logits.
        needs: a gradient of query, key, scale.
        backend: as in ``similarity``.
    """

    exchange: Exchange
    features: Features
    labels: Tensor
    col_labels: Tensor | None
    first_row: int
    sides: tuple[bool, bool, bool, bool]
    means: bool
    attend: bool
    keep: bool
    needs: tuple[bool, bool, bool]
    backend: str

    def travelling(self) -> list[Tensor]:
        """This rank's part of what every rank needs."""
        given = [] if self.col_labels is None else [self.col_labels]
        return [self.features.key, *self.features.teacher_key, *given]

    def inputs(self, block: Block) -> tuple:
        """Arguments of the op's halves for a block, from ``query`` to ``teacher_scale``."""
        query, own_key, scale, teacher_query, _, teacher_scale, _ = self.features
        key, *rest = block.tensors
        teacher_key, given = rest[: len(teacher_query)], rest[len(teacher_query) :]
        col_labels = given[0] if given else block.numbers(len(own_key), query.device)
        return (
            *(query, key, scale, block.places(self.labels, len(own_key))),
            *(col_labels - self.first_row, teacher_query, teacher_key, teacher_scale),
        )

    def raw(self, packed: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
        """Packed statistics of a side as the op has them: student (2 or 3, n), teachers (K, 4, n).

        And gradients likewise.
        """
        num_vectors, num_teachers = 2 + self.means, len(self.features.teacher_key) if soft else 0
        teachers = packed[num_vectors:].unflatten(0, (4, num_teachers)).transpose(0, 1)
        return packed[:num_vectors].contiguous(), teachers.contiguous()


def streamed(
    exchange: Exchange,
    features: Features,
    labels: Tensor,
    col_labels: Tensor | None,
    first_row: int,
    sides: tuple[bool, bool, bool, bool],
    means: bool,
    backend: str,
) -> tuple[Statistics | None, Statistics | None]:
    """Statistics of this rank's rows, and what they know of the columns.

    Shapes: query (b, D) and key (n, D) of this rank; labels (b,) global numbers of keys, col_labels
    (n,) of queries, by default the keys' own numbers; sides: rows, cols, soft rows, soft cols.
    Statistics of rows (b,), parts of those of columns (W, n); None for a side that is off.
    Gradients: query, key (summed over ranks, in its dtype) and scale.
    Memory: keys and teachers' keys of all ranks from forward to backward; with ``regather`` two
    chunks of them; only chunks where keys are constants and rows alone are wanted.
    Communication: see ``Exchange``.
    Raises: RuntimeError under ``create_graph=True``.
    """
    query, key, scale, teacher_query, *_ = features
    rows, cols, soft_rows, soft_cols = sides
    is_on = torch.is_grad_enabled()
    needs = (
        query.requires_grad and is_on,
        key.requires_grad and is_on,
        scale.requires_grad and is_on,
    )
    attend = rows and any(needs) and not (needs[1] or cols or soft_rows or soft_cols or means)
    num_cols = exchange.world_size * len(key)
    keep = any(needs) and not (attend or exchange.regather)
    plan = Plan(
        exchange,
        features._replace(query=query.detach(), key=key.detach(), scale=scale.detach()),
        labels,
        col_labels if cols else None,
        first_row,
        sides,
        means,
        attend,
        keep and keeps_logits(query, num_cols, teacher_query, backend),
        needs,
        backend,
    )
    packed_rows, packed_cols = _Streamed.apply(query, key, scale, plan)
    num_teachers = len(teacher_query)
    packed_cols = packed_cols.unflatten(-1, (exchange.world_size, -1)) if cols else packed_cols
    return (
        merging.unpack(packed_rows, means, soft_rows * num_teachers) if rows else None,
        merging.unpack(packed_cols, means, soft_cols * num_teachers) if cols else None,
    )


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        rows, cols, soft_rows, _ = plan.sides
        row_parts: list[Tensor] = []
        kept: list[Tensor] = []
        outlines: list[Block] = []
        all_cols = attended = None
        for block in plan.exchange.blocks(plan.travelling()):
            inputs = plan.inputs(block)
            row_stats, col_stats, teacher_rows, teacher_cols, pulled, logits = (
                torch.ops.kdengine.similarity_forward(
                    *inputs, *plan.sides, plan.means, plan.attend, plan.keep, plan.backend
                )
            )
            row_parts.append(_packed(row_stats, teacher_rows))
            part = _packed(col_stats, teacher_cols)
            if all_cols is None:
                num_cols = plan.exchange.world_size * len(key) if cols else 0
                all_cols = part.new_empty(len(part), num_cols)
            if cols:
                block.put_columns(all_cols, part)
            if plan.attend:
                named = named_rows(block.tensors[0], inputs[3], pulled.dtype)
                attended = _Attended.of(row_stats[0], pulled, named, attended)
            elif any(plan.needs) and not plan.exchange.regather:
                kept += [*block.tensors, logits]
                outlines.append(block._replace(tensors=[]))
        assert all_cols is not None
        all_rows = row_parts[0]
        if rows:
            num_teachers = len(teacher_rows) if soft_rows else 0
            sides = merging.unpack(torch.stack(row_parts, 1), plan.means, num_teachers)
            all_rows = merging.pack(merging.merge(sides))
        ctx.plan, ctx.outlines = plan, outlines
        if attended is not None:
            ctx.save_for_backward(query, scale, attended.pulled, attended.named)
        else:
            ctx.save_for_backward(all_rows, all_cols, *kept)
        return all_rows, all_cols

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor) -> tuple:
        refuse_create_graph("similarity")
        plan: Plan = ctx.plan
        if plan.attend:
            query, scale, pulled, named = ctx.saved_tensors
            pair = attended_gradients(grad_rows, query, scale, pulled, named)
            found = [x if need else None for x, need in zip(pair, plan.needs, strict=True)]
            return (*found, None)
        all_rows, all_cols, *kept = ctx.saved_tensors
        blocks = _again(plan, ctx.outlines, kept)
        return (*_gradients(plan, (all_rows, all_cols), (grad_rows, grad_cols), blocks), None)


def _gradients(
    plan: Plan,
    statistics: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    blocks: Iterator[tuple[Block, Tensor | None]],
) -> list[Tensor | None]:
    """Gradients of query, key and scale, None where none is needed."""
    query, key, scale, *_ = plan.features
    _, cols, soft_rows, soft_cols = plan.sides
    dtype = statistics[0].dtype
    of_query = torch.zeros_like(query, dtype=dtype)
    of_key = torch.zeros_like(key, dtype=dtype)
    of_scale = torch.zeros_like(scale)
    going: deque = deque()

    def come_home(limit: int) -> None:
        while len(going) > limit:
            part, gradient = going.popleft()
            of_key[part] += gradient.arrive()

    row_stats, row_grads = plan.raw(statistics[0], soft_rows), plan.raw(grads[0], soft_rows)
    for block, logits in blocks:
        col_stats, col_grads = (
            plan.raw(block.columns(x) if cols else x, soft_cols) for x in (statistics[1], grads[1])
        )
        by_query, by_key, by_scale = torch.ops.kdengine.similarity_backward(
            [row_grads[0], col_grads[0], row_grads[1], col_grads[1]],
            *plan.inputs(block),
            [row_stats[0], col_stats[0], row_stats[1], col_stats[1]],
            query.new_empty(0, 0, 0) if logits is None else logits,
            *plan.needs,
            plan.backend,
        )
        if plan.needs[0]:
            of_query += by_query
        if plan.needs[2]:
            of_scale += by_scale
        for _, gradient in going:
            gradient.advance()
        if plan.needs[1] and block.others:
            come_home(AHEAD - 1)
            going.append((block.part, plan.exchange.start_home(by_key, block.part)))
        elif plan.needs[1]:
            of_key += by_key
    come_home(0)
    found = of_query.to(query.dtype), of_key.to(key.dtype), of_scale
    return [x if need else None for x, need in zip(found, plan.needs, strict=True)]


def _again(
    plan: Plan, outlines: list[Block], kept: list[Tensor]
) -> Iterator[tuple[Block, Tensor | None]]:
    """The blocks, the own one last, and their logits: as they were kept, or gathered again."""
    if plan.exchange.regather:
        for block in plan.exchange.blocks(plan.travelling(), own_last=True):
            yield block, None
        return
    size = len(kept) // len(outlines)
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    for block, (*tensors, logits) in [*zip(outlines, groups, strict=True)][::-1]:
        yield block._replace(tensors=tensors), logits


def _packed(student: Tensor, teachers: Tensor) -> Tensor:
    """A side as the op has it, (2 or 3, n) and (K, 4, n), in the order of ``merging.pack``."""
    return (
        torch.cat([student, teachers.transpose(0, 1).flatten(0, 1)]) if len(teachers) else student
    )


class _Attended(NamedTuple):
    """Means of the keys under each row's softmax, over the blocks so far."""

    lse: Tensor
    pulled: Tensor
    named: Tensor

    @classmethod
    def of(
        cls, lse: Tensor, pulled: Tensor, named: Tensor, before: "_Attended | None"
    ) -> "_Attended":
        """With one more block: its log-sum-exps, its means, those positives that are in it."""
        if before is None:
            return cls(lse, pulled, named)
        # finite also where a row has nothing yet
        top = torch.logaddexp(before.lse, lse).clamp(min=torch.finfo(lse.dtype).min)
        mine, theirs = ((x - top).exp()[:, None] for x in (before.lse, lse))
        return cls(top, before.pulled * mine + pulled * theirs, before.named + named)
