# SPDX-License-Identifier: Apache-2.0
"""Shards in, batches out: the index of good samples, and loaders that decode with DALI.

Names load on first use: the processes that index shards need no torch, and a plain import of
this package starts neither torch nor DALI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdengine.data.batches import Loader
    from kdengine.data.clusters import ClusterRows
    from kdengine.data.index import DatasetIndex, ShardIndex, ensure_index
    from kdengine.data.loader import build_loader
    from kdengine.data.packing import PackReport, pack
    from kdengine.data.replay import Replay
    from kdengine.data.summary import summary_table
    from kdengine.data.synthetic import build_synthetic_loader
    from kdengine.data.views import ViewSpec

__all__ = [
    "ClusterRows",
    "DatasetIndex",
    "Loader",
    "PackReport",
    "Replay",
    "ShardIndex",
    "ViewSpec",
    "build_loader",
    "build_synthetic_loader",
    "ensure_index",
    "pack",
    "summary_table",
]

_HOMES = {
    "DatasetIndex": "index",
    "ShardIndex": "index",
    "ensure_index": "index",
    "ClusterRows": "clusters",
    "Loader": "batches",
    "build_loader": "loader",
    "build_synthetic_loader": "synthetic",
    "PackReport": "packing",
    "pack": "packing",
    "Replay": "replay",
    "summary_table": "summary",
    "ViewSpec": "views",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
