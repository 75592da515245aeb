# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification and retrieval, exact, chunked, on all ranks."""

from kdengine.evaluate.command import evaluate_command
from kdengine.evaluate.evaluator import Evaluator, run_evaluation
from kdengine.evaluate.retrieval import evaluate_retrieval
from kdengine.evaluate.sets import EvalSet, parse_eval_sets
from kdengine.evaluate.zeroshot import evaluate_zeroshot

__all__ = [
    "EvalSet",
    "Evaluator",
    "evaluate_command",
    "evaluate_retrieval",
    "evaluate_zeroshot",
    "parse_eval_sets",
    "run_evaluation",
]
