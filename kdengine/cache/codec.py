# SPDX-License-Identifier: Apache-2.0
"""How unit embeddings are stored: as they are, in bfloat16, or as 8-bit integers with a scale.

    fp32   x                                              4 bytes a value
    bf16   x rounded to nearest even                      2 bytes a value, error < 2^-8 of each
    int8   round(x / s), s = max |x| / 127 of the row     1 byte a value and 4 a row, error <= s / 2

A stored row is a few named arrays; the name "" is the row itself.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

STORAGES = ("fp32", "bf16", "int8")
ROW, SCALE = "", "-scale"


def encode(rows: Tensor, storage: str) -> dict[str, np.ndarray]:
    """Arrays to store for rows [n, E] float32; bfloat16 is kept as the int16 of the same bits."""
    if storage == "fp32":
        return {ROW: rows.numpy()}
    if storage == "bf16":
        return {ROW: rows.bfloat16().view(torch.int16).numpy()}
    scale = rows.abs().amax(1, keepdim=True) / 127
    steps = (rows / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round()
    return {ROW: steps.to(torch.int8).numpy(), SCALE: scale[:, 0].numpy()}


def decode(stored: Mapping[str, Tensor], storage: str, dtype: torch.dtype) -> Tensor:
    """Rows [n, E] in ``dtype`` on the device of what was stored."""
    row = stored[ROW]
    if storage == "int8":
        return (row.float() * stored[SCALE][:, None]).to(dtype)
    return (row.view(torch.bfloat16) if storage == "bf16" else row).to(dtype)


def arrays(storage: str) -> tuple[str, ...]:
    """Names of the arrays of a stored row."""
    return (ROW, SCALE) if storage == "int8" else (ROW,)


def errors(rows: Tensor, stored: Mapping[str, np.ndarray], storage: str) -> Tensor:
    """Length of what storing changed, of each of the unit rows [n, E]: [n]."""
    found = {name: torch.from_numpy(values) for name, values in stored.items()}
    return (decode(found, storage, torch.float32) - rows).norm(dim=1)
