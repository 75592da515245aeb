# SPDX-License-Identifier: Apache-2.0
"""One sweep over the similarity matrix, on one rank or many: global labels, gathers, merges.

Each rank computes one block of the global matrix, once, and the ranks exchange a few vectors:

    keys         block of a rank               complete on it   merged over ranks
    gathered     own rows x all columns        rows             own columns, by all-to-all
    replicated   own rows x all columns        rows             all columns, by all-gather
    sharded      all rows x own columns        columns          own rows, by all-to-all

``gathered`` also gathers key and teacher_key, and reduce-scatters the key's gradient unless the
key is constant; ``sharded`` does so with query; ``replicated`` moves no features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Features
from kdengine.ops import Statistics, similarity

Flags = tuple[bool, bool]


class Reduced(NamedTuple):
    """This rank's rows (or columns), reduced over the whole matrix.

    ``share`` makes the mean over ranks of ``mean`` the mean over all rows (or columns).
    """

    statistics: Statistics
    has_positive: Tensor
    share: float

    def mean(self, values: Tensor) -> Tensor:
        """Mean over this rank's part, and over teachers where there are some."""
        return values.mean() * self.share


class Layout(NamedTuple):
    """Where this rank's rows and columns lie in the global matrix."""

    keys: str
    group: Group
    num_ranks: int
    num_rows: int
    first_row: int
    total_rows: int
    num_cols: int
    first_col: int
    total_cols: int


def sweep(
    who: str,
    features: Features,
    labels: Tensor | None,
    col_labels: Tensor | None,
    *,
    hard: Flags,
    soft: Flags,
    keys: str,
    group: Group,
    backend: str,
) -> tuple[Reduced | None, Reduced | None]:
    """The reduced rows and columns, each where a term wants it; a flag a direction."""
    at = lay_out(who, features, keys, group)
    labels = row_labels(who, at, features, labels, hard[0])
    if col_labels is None:
        if hard[1]:
            _check_default(who, "col_labels", "hard_cols", at.total_cols, at.total_rows)
        device = features.query.device
        col_labels = torch.arange(at.first_col, at.first_col + at.num_cols, device=device)
    else:
        inputs.check_labels(who, "col_labels", col_labels, at.num_cols, at.total_rows)
    return _run(at, features, labels, col_labels, hard, soft, backend)


def reduced_rows(
    at: Layout, features: Features, labels: Tensor | None, *, soft: bool, backend: str
) -> Reduced:
    """The reduced rows alone; without labels no row has a positive."""
    none = nowhere(features)
    if labels is None:
        labels = none.expand(at.num_rows)
    flags = (True, False), (soft, False)
    rows, _ = _run(at, features, labels, none.expand(at.num_cols), *flags, backend)
    assert rows is not None
    return rows


def row_labels(
    who: str, at: Layout, features: Features, labels: Tensor | None, needed: bool
) -> Tensor:
    """Checked numbers of the rows' positives; by default row i of the global matrix has i."""
    if labels is not None:
        inputs.check_labels(who, "labels", labels, at.num_rows, at.total_cols)
        return labels
    if needed:
        _check_default(who, "labels", "hard_rows", at.total_rows, at.total_cols)
    device = features.query.device
    return torch.arange(at.first_row, at.first_row + at.num_rows, device=device)


def nowhere(features: Features) -> Tensor:
    """(1,), the number of a positive that does not exist."""
    return torch.full((1,), -1, device=features.query.device)


def lay_out(who: str, features: Features, keys: str, group: Group) -> Layout:
    """Offsets and totals; refuses sizes that differ where they must not, on every rank."""
    inputs.check_keys(who, keys)
    num_rows, num_cols = len(features.query), len(features.key)
    num_ranks, own = distributed.world_size(group), distributed.rank(group)
    sizes = distributed.gather_sizes((num_rows, num_cols), group, features.query.device)
    all_cols = [cols for _, cols in sizes]
    distributed.require_even(who, "query", [rows for rows, _ in sizes])
    if keys != "sharded":
        distributed.require_even(who, "key", all_cols)
    if num_rows == 0 or 0 in all_cols:
        raise ValueError(
            f"{who}: query and key need at least one row; {num_rows} and {all_cols} (by rank) "
            "came; skip an empty batch"
        )
    return Layout(
        keys,
        group,
        num_ranks,
        num_rows,
        own * num_rows,
        num_ranks * num_rows,
        num_cols,
        0 if keys == "replicated" else sum(all_cols[:own]),
        num_cols if keys == "replicated" else sum(all_cols),
    )


def _check_default(who: str, name: str, term: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(
            f"{who}: without {name}, number i of {count} has positive i; there are only {limit}; "
            f"give {name} or switch {term} off"
        )


def _run(
    at: Layout,
    features: Features,
    labels: Tensor,
    col_labels: Tensor,
    hard: Flags,
    soft: Flags,
    backend: str,
) -> tuple[Reduced | None, Reduced | None]:
    on_rows, on_cols = hard[0] or soft[0], hard[1] or soft[1]
    if not (on_rows or on_cols):
        return None, None
    if not any(soft):
        features = features._replace(teacher_query=[], teacher_key=[])
    has_row = (labels >= 0) & (labels < at.total_cols)
    has_col = (col_labels >= 0) & (col_labels < at.total_rows)
    # a merged side differentiates scale after the merge: the gradient belongs to its owner
    is_merged = at.num_ranks > 1 and (on_rows if at.keys == "sharded" else on_cols)
    split = is_merged and features.scale.requires_grad and torch.is_grad_enabled()
    block, block_labels, block_col_labels = own_block(at, features, labels, col_labels)
    rows, cols = similarity(
        block.query,
        block.key,
        block.scale.detach() if split else block.scale,
        block_labels,
        block_col_labels,
        teacher_query=block.teacher_query,
        teacher_key=block.teacher_key,
        teacher_scale=block.teacher_scale if any(soft) else None,
        rows=on_rows,
        cols=on_cols,
        soft_rows=soft[0],
        soft_cols=soft[1],
        means=split,
        backend=backend,
    )
    if at.num_ranks > 1 and at.keys == "sharded" and rows is not None:
        rows = merge(_scatter(rows, at))
    if at.num_ranks > 1 and at.keys != "sharded" and cols is not None:
        cols = merge(_scatter(cols, at) if at.keys == "gathered" else _share(cols, at))
    if split:
        rows, cols = (side and with_scale(side, features.scale) for side in (rows, cols))
    share = at.num_cols * at.num_ranks / at.total_cols if at.keys == "sharded" else 1.0
    return (
        None if rows is None else Reduced(rows, has_row, 1.0),
        None if cols is None else Reduced(cols, has_col, share),
    )


def own_block(
    at: Layout, features: Features, labels: Tensor, col_labels: Tensor
) -> tuple[Features, Tensor, Tensor]:
    """This rank's block of the matrix, with label numbers that count from its corner."""
    if at.num_ranks == 1:
        return features, labels, col_labels
    group = at.group
    if at.keys == "sharded":
        block = features._replace(
            query=_gather(features.query, features, group),
            # nothing averages a shard's gradient over ranks, so it is that of the mean already
            key=distributed.scale_gradient(features.key, 1 / at.num_ranks),
            teacher_query=[distributed.gather_constant(u, group) for u in features.teacher_query],
        )
        return block, distributed.gather_constant(labels, group) - at.first_col, col_labels
    if at.keys == "gathered":
        features = features._replace(
            key=_gather(features.key, features, group),
            teacher_key=[distributed.gather_constant(v, group) for v in features.teacher_key],
        )
        col_labels = distributed.gather_constant(col_labels, group)
    return features, labels, col_labels - at.first_row


def _gather(x: Tensor, features: Features, group: Group) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return distributed.gather_rows(x, group, features.dtype)
    return distributed.gather_constant(x, group)


def _pack(side: Statistics) -> Tensor:
    vectors = [side.others, side.positive, *([side.mean] if side.mean.numel() else [])]
    teachers = side[3:] if len(side.gap) else ()
    return torch.cat([torch.stack(vectors), *teachers])


def _unpack(packed: Tensor, like: Statistics) -> Statistics:
    num_vectors = 3 if like.mean.numel() else 2
    others, positive, *mean = packed[:num_vectors]
    teachers = packed[num_vectors:].chunk(4) if len(like.gap) else like[3:]
    return Statistics(others, positive, mean[0] if mean else like.mean, *teachers)


def _scatter(side: Statistics, at: Layout) -> Statistics:
    """Parts of this rank's vectors, (W, n): what each rank's block says about them."""
    packed = _pack(side).unflatten(1, (at.num_ranks, -1))
    parts = distributed.exchange(packed.transpose(0, 1), at.group)
    return _unpack(parts.transpose(0, 1), side)


def _share(side: Statistics, at: Layout) -> Statistics:
    """Parts of all vectors, (W, n)."""
    parts = distributed.gather_rows(_pack(side), at.group).unflatten(0, (at.num_ranks, -1))
    return _unpack(parts.transpose(0, 1), side)


def merge(parts: Statistics) -> Statistics:
    """Statistics over a disjoint union, from those of its W parts (dimension -2)."""

    def blend(values: Tensor, lse: Tensor) -> Tensor:
        return (lse.detach().softmax(-2) * values).sum(-2)

    merged = parts._replace(
        others=parts.others.logsumexp(-2),
        # at most one part has the positive; the others say 0
        positive=parts.positive.sum(-2),
        mean=blend(parts.mean, parts.others) if parts.mean.numel() else parts.mean,
    )
    if not len(parts.gap):
        return merged
    return merged._replace(
        teacher_others=parts.teacher_others.logsumexp(-2),
        teacher_positive=parts.teacher_positive.sum(-2),
        gap=blend(parts.gap, parts.teacher_others),
        teacher_mean=blend(parts.teacher_mean, parts.teacher_others),
    )


def with_scale(side: Statistics, scale: Tensor) -> Statistics:
    """The same numbers with a gradient to scale: d z / d scale = z / scale in every mean."""
    # 0 in value, 1 / scale in derivative
    rate = (scale - scale.detach()) / scale.detach()
    under_teacher = side.teacher_mean - side.gap.detach()
    return side._replace(
        others=side.others + rate * side.mean,
        positive=side.positive + rate * side.positive.detach(),
        gap=side.gap - rate * under_teacher,
    )
