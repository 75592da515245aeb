# SPDX-License-Identifier: Apache-2.0
"""Losses on feature tensors: pure functions with ``group=`` and ``backend=``, and two modules."""

from kdengine.losses.clip import ClipLoss, DistillClipLoss
from kdengine.losses.clusters import ClusterTerms, cluster_terms
from kdengine.losses.ensemble import ensemble, ensemble_width
from kdengine.losses.gradients import gradient
from kdengine.losses.inputs import unit_rows
from kdengine.losses.moments import moment_alignment
from kdengine.losses.named import (
    augmented_feature,
    cluster_cross_entropy,
    cluster_kl,
    contrastive_relational,
    feature,
    info_nce,
    interactive_contrastive,
    logit_kl,
    unit_feature,
)
from kdengine.losses.similarity import (
    SimilarityTerms,
    similarity_loss,
    similarity_lse,
    similarity_terms,
)

__all__ = [
    "ClipLoss",
    "ClusterTerms",
    "DistillClipLoss",
    "SimilarityTerms",
    "augmented_feature",
    "cluster_cross_entropy",
    "cluster_kl",
    "cluster_terms",
    "contrastive_relational",
    "ensemble",
    "ensemble_width",
    "feature",
    "gradient",
    "info_nce",
    "interactive_contrastive",
    "logit_kl",
    "moment_alignment",
    "similarity_loss",
    "similarity_lse",
    "similarity_terms",
    "unit_feature",
    "unit_rows",
]
