# SPDX-License-Identifier: Apache-2.0
"""Where a rank's rows and columns lie in the global matrix; agreed on before anything travels."""

from typing import NamedTuple

import torch

from kdengine import distributed
from kdengine.distributed import Exchange
from kdengine.losses import inputs
from kdengine.losses.inputs import Features


class Layout(NamedTuple):
    """Where this rank's rows and columns lie in the global matrix."""

    keys: str
    exchange: Exchange
    num_ranks: int
    num_rows: int
    first_row: int
    total_rows: int
    num_cols: int
    first_col: int
    total_cols: int


def lay_out(
    who: str, features: Features, keys: str, exchange: Exchange, given: tuple[bool, bool]
) -> Layout:
    """Offsets and totals; refuses on every rank what differs between ranks and must not."""
    inputs.check_keys(who, keys)
    num_rows, num_cols = len(features.query), len(features.key)
    query, key = features.query, [features.key, *features.teacher_key]
    if keys == "sharded":
        query, key = features.key, [features.query, *features.teacher_query]
    numbers = {
        "query": num_rows,
        "key": num_cols,
        # a difference here would hang a collective as well
        "bytes of a row that travels": sum(x.shape[1] * x.itemsize for x in key),
        "gradient of what travels": int(key[0].requires_grad and torch.is_grad_enabled()),
        "given labels": given[0] + 2 * given[1],
        "num_chunks": exchange.num_chunks or 0,
        "regather": int(exchange.regather),
        "per_node": exchange.per_node,
    }
    by_name = exchange.gather_numbers(numbers, query.device)
    all_cols = by_name.pop("key")
    distributed.require_even(who, "query", by_name.pop("query"))
    if keys != "sharded":
        distributed.require_even(who, "key", all_cols)
    for name, values in by_name.items():
        distributed.require_same(who, name, values)
    if num_rows == 0 or 0 in all_cols:
        raise ValueError(
            f"{who}: query and key need at least one row; {num_rows} and {all_cols} (by rank) "
            "came; skip an empty batch"
        )
    own, num_ranks = exchange.rank, exchange.world_size
    return Layout(
        keys,
        exchange,
        num_ranks,
        num_rows,
        own * num_rows,
        num_ranks * num_rows,
        num_cols,
        0 if keys == "replicated" else sum(all_cols[:own]),
        num_cols if keys == "replicated" else sum(all_cols),
    )


def check_default(who: str, name: str, term: str, count: int, limit: int) -> None:
    """Raise ValueError where there is no i-th positive for every i."""
    if count > limit:
        raise ValueError(
            f"{who}: without {name}, number i of {count} has positive i; there are only {limit}; "
            f"give {name} or switch {term} off"
        )
