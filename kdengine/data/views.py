# SPDX-License-Identifier: Apache-2.0
"""What a tower wants to see: the size of its images and how they are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Preprocess(Protocol):
    """What a model says of the images that it wants."""

    @property
    def size(self) -> int:
        """Side in pixels."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel, of 1."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel, of 1."""
        ...


@dataclass(frozen=True)
class ViewSpec:
    """One square view of every image.

    `size` is the side in pixels; `mean` and `std` are per channel on the scale 0 to 1, as in
    open_clip: out = (pixel / 255 - mean) / std.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"view: size must be at least 1 pixel, got {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"view: mean and std need 3 values each, std above 0; "
                f"got mean={self.mean}, std={self.std}"
            )

    @classmethod
    def like(cls, preprocess: Preprocess) -> ViewSpec:
        """The view that a model wants."""
        return cls(preprocess.size, preprocess.mean, preprocess.std)
