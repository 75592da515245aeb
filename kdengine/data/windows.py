# SPDX-License-Identifier: Apache-2.0
"""Which part of an image a view shows: drawn at random, looked up, or all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types

# (shape of the image HWC, its source_info) -> (anchor, shape) of the window, both (rows, columns),
# and the number of the view among the stored ones, int64 [1]
WindowSource = Callable[[Any, Any], tuple[Any, Any, Any]]

# windows of training: share of the image's area, width / height
CROP_AREA, CROP_ASPECT = (0.9, 1.0), (3 / 4, 4 / 3)


def random_windows(seed: int) -> WindowSource:
    """Windows of a random resized crop: see `CROP_AREA` and `CROP_ASPECT`."""

    def draw(shape: Any, source: Any) -> tuple[Any, Any, Any]:
        anchor, extent = fn.random_crop_generator(
            shape, random_area=list(CROP_AREA), random_aspect_ratio=list(CROP_ASPECT), seed=seed
        )
        return anchor, extent, anchor[0:1] * 0

    return draw


def stored_windows(
    find: Callable[[list[str], np.ndarray], np.ndarray], num_views: int, seed: int
) -> WindowSource:
    """Windows that were stored: of each sample one of `num_views`, drawn anew every time.

    Args:
        find: (`source_info` of n samples, numbers of views int64 [n]) -> windows int64 [n, 4]; it
            is called in DALI's thread, some batches ahead.
        num_views: stored views of a sample.
        seed: of the draw, which is part of the pipeline's checkpoint.
    """

    def look_up(
        sources: list[np.ndarray], numbers: list[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        names = [source.tobytes().decode() for source in sources]
        windows = find(names, np.concatenate(numbers).astype(np.int64))
        return list(windows[:, :2]), list(windows[:, 2:])

    def draw(shape: Any, source: Any) -> tuple[Any, Any, Any]:
        values = list(range(num_views))
        number = fn.random.uniform(values=values, shape=[1], dtype=types.INT64, seed=seed)
        window: Any = fn.python_function(
            source, number, function=look_up, num_outputs=2, batch_processing=True
        )
        return window[0], window[1], number

    return draw


def whole_images(shape: Any, source: Any) -> tuple[Any, Any, Any]:
    """Windows that cover the images."""
    extent = fn.cast(shape[0:2], dtype=types.INT64)
    return extent * 0, extent, extent[0:1] * 0
