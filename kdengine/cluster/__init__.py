# SPDX-License-Identifier: Apache-2.0
"""What embeddings of a data set say of it: its clusters, and what it holds several times."""

from kdengine.cluster.balance import balance_command
from kdengine.cluster.command import cluster_command
from kdengine.cluster.embeddings import Embeddings, open_embeddings
from kdengine.cluster.search import Rule, Wanted

__all__ = [
    "Embeddings",
    "Rule",
    "Wanted",
    "balance_command",
    "cluster_command",
    "open_embeddings",
]
