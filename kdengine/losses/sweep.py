# SPDX-License-Identifier: Apache-2.0
"""One sweep over the similarity matrix, on one rank or many: global labels, blocks, merges.

Each rank computes one block of the global matrix, once, and the ranks exchange a few vectors:

    keys         block of a rank               complete on it   merged over ranks
    gathered     own rows x all columns        rows             own columns, by all-to-all
    replicated   own rows x all columns        rows             all columns, by all-gather
    sharded      all rows x own columns        columns          own rows, by all-to-all

``gathered`` streams key and teacher_key through an ``Exchange``, and the key's gradient home unless
the key is constant; ``sharded`` does so with query and teacher_query, as ``gathered`` with rows and
columns swapped; ``replicated`` moves no features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Features
from kdengine.losses.layout import Layout, check_default, lay_out
from kdengine.losses.merging import merge, pack, unpack, with_scale
from kdengine.losses.streamed import streamed
from kdengine.ops import Statistics, similarity

Flags = tuple[bool, bool]
T = TypeVar("T")


class Reduced(NamedTuple):
    """This rank's rows (or columns), reduced over the whole matrix.

    ``share`` makes the mean over ranks of ``mean`` the mean over all rows (or columns).
    ``labels`` are global; one outside 0..limit names no positive.
    """

    statistics: Statistics
    labels: Tensor
    limit: int
    share: float

    def has_positive(self) -> Tensor:
        """Which rows have a positive."""
        return (self.labels >= 0) & (self.labels < self.limit)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over this rank's part, and over teachers where there are some."""
        return values.mean() * self.share


def eager_over_ranks(function: Callable[..., T]) -> Callable[..., T]:
    """Leave a function out of compiled graphs where its ``group`` has several ranks.

    Collectives that travel while something else runs are not for a compiler.
    """
    eager = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, group: Group | Exchange, **options: Any) -> T:
        exchange = Exchange.over(group)
        run = function if exchange.world_size == 1 else eager
        return run(*args, group=exchange, **options)

    return call


@eager_over_ranks
def sweep(
    who: str,
    features: Features,
    labels: Tensor | None,
    col_labels: Tensor | None,
    *,
    hard: Flags,
    soft: Flags,
    keys: str,
    group: Exchange,
    backend: str,
) -> tuple[Reduced | None, Reduced | None]:
    """The reduced rows and columns, each where a term wants it; a flag a direction."""
    at = lay_out(who, features, keys, group, (labels is not None, col_labels is not None))
    check_row_labels(who, at, labels, hard[0])
    if col_labels is not None:
        inputs.check_labels(who, "col_labels", col_labels, at.num_cols, at.total_rows)
    elif hard[1]:
        check_default(who, "col_labels", "hard_cols", at.total_cols, at.total_rows)
    return _run(at, features, labels, col_labels, hard, soft, backend)


def reduced_rows(
    at: Layout, features: Features, labels: Tensor, *, soft: bool, backend: str
) -> Reduced:
    """The reduced rows alone."""
    rows, _ = _run(at, features, labels, None, (True, False), (soft, False), backend)
    assert rows is not None
    return rows


def without_teachers(features: Features) -> Features:
    """The student's features alone."""
    none = features.teacher_scale.new_empty(0)
    return features._replace(teacher_query=[], teacher_key=[], teacher_scale=none)


def check_row_labels(who: str, at: Layout, labels: Tensor | None, needed: bool) -> None:
    """Raise for numbers of the rows' positives that do not fit, or for default ones that cannot."""
    if labels is not None:
        inputs.check_labels(who, "labels", labels, at.num_rows, at.total_cols)
    elif needed:
        check_default(who, "labels", "hard_rows", at.total_rows, at.total_cols)


def _run(
    at: Layout,
    features: Features,
    labels: Tensor | None,
    col_labels: Tensor | None,
    hard: Flags,
    soft: Flags,
    backend: str,
) -> tuple[Reduced | None, Reduced | None]:
    on = hard[0] or soft[0], hard[1] or soft[1]
    if not any(on):
        return None, None
    if not any(soft):
        features = without_teachers(features)
    device = features.query.device
    own_rows, own_cols = (at.first_row, at.num_rows), (at.first_col, at.num_cols)
    is_paired = labels is None and own_rows == own_cols
    row_numbers = _count(*own_rows, device) if labels is None else labels
    if col_labels is not None:
        col_numbers = col_labels
    else:
        col_numbers = row_numbers if is_paired else _count(*own_cols, device)
    if at.num_ranks == 1 or at.keys == "replicated":
        rows, cols = _whole(at, features, (row_numbers, col_numbers), on, soft, backend)
    elif at.keys == "gathered":
        rows, cols = _spread(
            at.exchange, features, row_numbers, col_labels, at.first_row, on, soft, backend
        )
    else:
        swapped = features._replace(
            # nothing averages a shard's gradient over ranks, so it is that of the mean already
            query=distributed.scale_gradient(features.key, 1 / at.num_ranks),
            key=features.query,
            teacher_query=features.teacher_key,
            teacher_key=features.teacher_query,
        )
        cols, rows = _spread(
            at.exchange, swapped, col_numbers, labels, at.first_col, on[::-1], soft[::-1], backend
        )
    share = at.num_cols * at.num_ranks / at.total_cols if at.keys == "sharded" else 1.0
    return (
        None if rows is None else Reduced(rows, row_numbers, at.total_cols, 1.0),
        None if cols is None else Reduced(cols, col_numbers, at.total_rows, share),
    )


def _count(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device)


def _whole(
    at: Layout,
    features: Features,
    labels: tuple[Tensor, Tensor],
    on: Flags,
    soft: Flags,
    backend: str,
) -> tuple[Statistics | None, Statistics | None]:
    """All columns are here; those of several ranks' rows are merged over the ranks."""
    split = at.num_ranks > 1 and on[1] and _learns(features.scale)
    rows, cols = similarity(
        features.query,
        features.key,
        features.scale.detach() if split else features.scale,
        labels[0],
        labels[1] - at.first_row if at.first_row else labels[1],
        teacher_query=features.teacher_query,
        teacher_key=features.teacher_key,
        teacher_scale=features.teacher_scale,
        rows=on[0],
        cols=on[1],
        soft_rows=soft[0],
        soft_cols=soft[1],
        means=split,
        backend=backend,
    )
    if at.num_ranks > 1 and cols is not None:
        parts = distributed.gather_rows(pack(cols), at.exchange.group)
        parts = parts.unflatten(0, (at.num_ranks, -1)).transpose(0, 1)
        cols = merge(unpack(parts, split, len(cols.gap)))
    return _with_scale(rows, cols, features.scale) if split else (rows, cols)


def _spread(
    exchange: Exchange,
    features: Features,
    labels: Tensor,
    col_labels: Tensor | None,
    first_row: int,
    on: Flags,
    soft: Flags,
    backend: str,
) -> tuple[Statistics | None, Statistics | None]:
    """Keys come from all ranks; what all rows say about this rank's columns comes as well."""
    split = on[1] and _learns(features.scale)
    student = features._replace(scale=features.scale.detach()) if split else features
    rows, parts = streamed(
        exchange, student, labels, col_labels, first_row, (*on, *soft), split, backend
    )
    cols = None
    if parts is not None:
        # (F, W, n): to each rank what this rank's rows say about its columns
        sent = pack(parts).transpose(0, 1)
        received = distributed.all_to_all(sent, exchange.group).transpose(0, 1)
        cols = merge(unpack(received, split, len(parts.gap)))
    return _with_scale(rows, cols, features.scale) if split else (rows, cols)


def _learns(scale: Tensor) -> bool:
    """Whether the scale gets its gradient after a merge, where it belongs to the side's owner."""
    return scale.requires_grad and torch.is_grad_enabled()


def _with_scale(
    rows: Statistics | None, cols: Statistics | None, scale: Tensor
) -> tuple[Statistics | None, Statistics | None]:
    return rows and with_scale(rows, scale), cols and with_scale(cols, scale)
