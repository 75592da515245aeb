# SPDX-License-Identifier: Apache-2.0
"""A loss of rows alone: with its gradients from the forward, or by the general sweep."""

import torch
from torch import Tensor

from kdengine.distributed import Exchange
from kdengine.losses import inputs
from kdengine.losses.inputs import Features
from kdengine.losses.layout import Layout, lay_out
from kdengine.losses.sweep import (
    check_row_labels,
    eager_over_ranks,
    reduced_rows,
    without_teachers,
)
from kdengine.losses.terms import hard_term, soft_terms
from kdengine.ops import Statistics, similarity_rows
from kdengine.ops.row_terms import with_margin
from kdengine.ops.similarity_rows import applies


@eager_over_ranks
def row_loss(
    who: str,
    features: Features,
    labels: Tensor | None,
    *,
    hard: float,
    soft: float = 0.0,
    margin: float = 0.0,
    keys: str,
    group: Exchange,
    backend: str,
) -> Tensor:
    """``hard * mean_i CE + soft * mean_i KL`` of the rows alone; CE with an angular margin.

    One number has one upstream gradient, so that the gradients may be made in the forward, for
    fewer products; see ``kdengine.ops.similarity_rows``.
    """
    if not soft:
        features = without_teachers(features)
    at = lay_out(who, features, keys, group, (True, False))
    check_row_labels(who, at, labels, hard != 0)
    if labels is None:
        first, device = at.first_row, features.query.device
        labels = torch.arange(first, first + at.num_rows, device=device)
    weights = {"hard": hard, "soft": soft, "margin": margin}
    loss = _at_once(at, features, labels, **weights, backend=backend)
    if loss is not None:
        return loss
    rows = reduced_rows(at, features, labels, soft=soft != 0, backend=backend)
    loss = torch.zeros((), dtype=features.dtype, device=features.query.device)
    has = rows.has_positive()
    if hard:
        stats = rows.statistics
        target, _ = with_margin(stats.positive, features.scale, margin)
        stats = stats._replace(positive=target)
        loss = loss + hard * hard_term(rows._replace(statistics=stats), has)
    return loss + soft * soft_terms(rows, has)[0] if soft else loss


@eager_over_ranks
def row_statistics(
    who: str,
    features: Features,
    exclude: Tensor | None,
    *,
    keys: str,
    group: Exchange,
    backend: str,
) -> Statistics:
    """Statistics of the rows; their positives are the columns left out, none by default."""
    at = lay_out(who, features, keys, group, (True, False))
    if exclude is None:
        exclude = torch.full((1,), -1, device=features.query.device).expand(at.num_rows)
    else:
        inputs.check_labels(who, "labels", exclude, at.num_rows, at.total_cols)
    return reduced_rows(at, features, exclude, soft=False, backend=backend).statistics


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

    None otherwise, and where keys have to travel: they arrive while statistics are made.
    """
    query, key, scale = features[:3]
    teachers = len(features.teacher_query)
    if at.num_ranks > 1 and at.keys != "replicated":
        return None
    if not applies(query, key, scale, at.total_cols, teachers, margin, backend):
        return None
    return similarity_rows(
        features.query,
        features.key,
        features.scale,
        labels,
        teacher_query=features.teacher_query,
        teacher_key=features.teacher_key,
        teacher_scale=features.teacher_scale if teachers else None,
        hard=hard,
        soft=soft,
        margin=margin,
        backend=backend,
    )
