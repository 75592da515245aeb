# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification and retrieval, exact, chunked, on all ranks.

Names load on first use: what the words of a command line mean is found out without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdengine.evaluate.command import evaluate_command
    from kdengine.evaluate.evaluator import Evaluator, run_evaluation
    from kdengine.evaluate.layout import LocalSet, find_sets
    from kdengine.evaluate.retrieval import evaluate_retrieval
    from kdengine.evaluate.sets import EvalSet, parse_eval_sets
    from kdengine.evaluate.suite import evaluate_suite
    from kdengine.evaluate.zeroshot import evaluate_zeroshot

__all__ = [
    "EvalSet",
    "Evaluator",
    "LocalSet",
    "evaluate_command",
    "evaluate_retrieval",
    "evaluate_suite",
    "evaluate_zeroshot",
    "find_sets",
    "parse_eval_sets",
    "run_evaluation",
]

_HOMES = {
    "EvalSet": "sets",
    "Evaluator": "evaluator",
    "LocalSet": "layout",
    "evaluate_command": "command",
    "evaluate_retrieval": "retrieval",
    "evaluate_suite": "suite",
    "evaluate_zeroshot": "zeroshot",
    "find_sets": "layout",
    "parse_eval_sets": "sets",
    "run_evaluation": "evaluator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
