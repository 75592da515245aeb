# SPDX-License-Identifier: Apache-2.0
"""A loss of rows alone: with its gradients from the forward, or by the general sweep."""

import torch
from torch import Tensor

from kdengine.distributed import Group
from kdengine.losses.inputs import Features
from kdengine.losses.sweep import Layout, lay_out, nowhere, own_block, reduced_rows, row_labels
from kdengine.losses.terms import hard_term, soft_terms
from kdengine.ops import similarity_rows
from kdengine.ops.row_terms import with_margin
from kdengine.ops.similarity_rows import applies


def row_loss(
    who: str,
    features: Features,
    labels: Tensor | None,
    *,
    hard: float,
    soft: float = 0.0,
    margin: float = 0.0,
    keys: str,
    group: Group,
    backend: str,
) -> Tensor:
    """``hard * mean_i CE + soft * mean_i KL`` of the rows alone; CE with an angular margin.

    One number has one upstream gradient, so that the gradients may be made in the forward, for
    fewer products; see ``kdengine.ops.similarity_rows``.
    """
    if not soft:
        features = features._replace(teacher_query=[], teacher_key=[])
    at = lay_out(who, features, keys, group)
    labels = row_labels(who, at, features, labels, hard != 0)
    weights = {"hard": hard, "soft": soft, "margin": margin}
    loss = _at_once(at, features, labels, **weights, backend=backend)
    if loss is not None:
        return loss
    rows = reduced_rows(at, features, labels, soft=soft != 0, backend=backend)
    loss = torch.zeros((), dtype=features.dtype, device=features.query.device)
    if hard:
        stats = rows.statistics
        target, _ = with_margin(stats.positive, features.scale, margin)
        stats = stats._replace(positive=target)
        loss = loss + hard * hard_term(rows._replace(statistics=stats))
    return loss + soft * soft_terms(rows)[0] if soft else loss


def _at_once(
    at: Layout,
    features: Features,
    labels: Tensor,
    *,
    hard: float,
    soft: float,
    margin: float,
    backend: str,
) -> Tensor | None:
    """The weighted loss of this rank's rows with gradients made in its forward, where that pays.

    None otherwise, and where a row is not complete on any rank.
    """
    query, key, scale = features[:3]
    teachers = len(features.teacher_query)
    if at.num_ranks > 1 and at.keys == "sharded":
        return None
    if not applies(query, key, scale, at.total_cols, teachers, margin, backend):
        return None
    none = nowhere(features).expand(at.num_cols)
    block, block_labels, _ = own_block(at, features, labels, none)
    return similarity_rows(
        block.query,
        block.key,
        block.scale,
        block_labels,
        teacher_query=block.teacher_query,
        teacher_key=block.teacher_key,
        teacher_scale=block.teacher_scale if teachers else None,
        hard=hard,
        soft=soft,
        margin=margin,
        backend=backend,
    )
