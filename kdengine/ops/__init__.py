# SPDX-License-Identifier: Apache-2.0
"""Custom ops: schema, autograd and the choice of a backend; no process groups, no config."""

from kdengine.ops._backend import set_workspace
from kdengine.ops.assign import Assignment, assign, range_join
from kdengine.ops.feature import feature, unit_feature
from kdengine.ops.gradient import gradient
from kdengine.ops.moments import moments
from kdengine.ops.similarity import Statistics, similarity
from kdengine.ops.similarity_rest import similarity_rest
from kdengine.ops.similarity_rows import similarity_rows
from kdengine.ops.terms import has_terms, terms

__all__ = [
    "Assignment",
    "Statistics",
    "assign",
    "feature",
    "gradient",
    "has_terms",
    "moments",
    "range_join",
    "set_workspace",
    "similarity",
    "similarity_rest",
    "similarity_rows",
    "terms",
    "unit_feature",
]
