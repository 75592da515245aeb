# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend's strips: how a similarity matrix is made, a few rows at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdengine.ops._backend import statistics_dtype

# strips in the workspace at a time; one more in a forward with teachers that takes the general way
NUM_BUFFERS = 4
# of the workspace, for pieces of low precision features in full precision
PIECE_SHARE = 8
# tall enough for fast products and few calls, not taller
MIN_STRIP_ROWS, MAX_STRIP_ROWS = 16, {"cpu": 512, "cuda": 8192}


class Product:
    """Strips of ``scale * left @ right.T``, in full precision.

    Low precision features are converted in pieces of ``piece_bytes``, each time a strip needs them:
    a conversion is little beside the product. Where there is only one piece it stays.
    """

    def __init__(
        self, left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype, piece_bytes: int
    ) -> None:
        self.left, self.dtype, self.scale = left, dtype, scale.to(dtype)
        self.is_low = right.dtype != dtype
        num_cols, height = len(right), len(right)
        if self.is_low:
            height = max(MIN_STRIP_ROWS, piece_bytes // (right.shape[1] * dtype.itemsize))
        self.parts = [slice(i, min(i + height, num_cols)) for i in range(0, num_cols, height)]
        self.right = right.to(dtype) if len(self.parts) == 1 else right
        # the whole matrix, if it is small enough to be kept from the forward to the backward
        self.kept: Tensor | None = None
        self.is_known = False

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The right features in full precision."""
        for part in self.parts:
            yield part, self.right[part].to(self.dtype)

    def strip(self, rows: slice, out: Tensor) -> Tensor:
        """The logits of some rows: in ``out``, or where they are kept."""
        place = out[: rows.stop - rows.start] if self.kept is None else self.kept[rows]
        if not self.is_known:
            # scaled here instead of once a logit
            scaled = self.left[rows].to(self.dtype) * self.scale
            for part, right in self.pieces():
                torch.mm(scaled, right.mT, out=place[:, part])
        return place

    def pull(self, weights: Tensor, out: Tensor) -> Tensor:
        """``weights @ right``."""
        for part, right in self.pieces():
            if part.start:
                out.addmm_(weights[:, part], right)
            else:
                torch.mm(weights[:, part], right, out=out)
        return out


def products(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    budget: int,
) -> list[Product]:
    """The student's product, then those of the teachers."""
    dtype = statistics_dtype(query, key, *teacher_query, *teacher_key)
    every = [(query, key, scale), *zip(teacher_query, teacher_key, teacher_scale, strict=True)]
    return [Product(*matrix, dtype, budget // PIECE_SHARE // len(every)) for matrix in every]


def cut(
    student: Product, budget: int, num_buffers: int = NUM_BUFFERS
) -> tuple[list[slice], Tensor]:
    """Strips of which ``num_buffers`` fit the budget, and a buffer that holds the tallest."""
    num_rows, num_cols = len(student.left), len(student.right)
    width, itemsize = student.left.shape[1], student.dtype.itemsize
    kind = "cuda" if student.left.is_cuda else "cpu"
    if student.is_low:
        budget -= budget // PIECE_SHARE
    # with a few strips of features
    height = budget // (itemsize * (num_buffers * num_cols + 3 * width))
    height = min(max(MIN_STRIP_ROWS, min(height, MAX_STRIP_ROWS[kind])), num_rows)
    strips = [slice(i, min(i + height, num_rows)) for i in range(0, num_rows, height)]
    return strips, student.left.new_empty(height, num_cols, dtype=student.dtype)
