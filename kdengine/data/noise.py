# SPDX-License-Identifier: Apache-2.0
"""Draws that depend on numbers alone: nothing to save, equal on any machine."""

import numpy as np


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 from integers and integer arrays (SplitMix64), equal on any machine."""
    noise: np.ndarray = np.zeros((), np.uint64)
    for word in words:
        with np.errstate(over="ignore"):
            noise = noise + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            noise = (noise ^ (noise >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            noise = (noise ^ (noise >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            noise = noise ^ (noise >> np.uint64(31))
    return noise
