# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds beside weights: counters and the states of random generators."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class State:
    """Where a run stands; counts are those of completed steps."""

    step: int = 0
    samples_seen: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    elapsed_s: float = 0.0
    is_cut: bool = False
    best: float | None = None


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators as plain containers and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo every random draw since ``random_state`` returned ``state``."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
