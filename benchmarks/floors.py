# SPDX-License-Identifier: Apache-2.0
"""What no implementation can beat, measured in the same run: matrix products and memory copies."""

import functools

import torch

from benchmarks.common import time_interleaved

# the product of a strip goes into a buffer of at most this size
BUFFER_BYTES = 4 << 30
SECONDS = 0.4


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers: zeros would run faster than real data."""
    return torch.randn(rows, width, device=device).to(dtype)


@functools.cache
def product_ms(
    rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    cols: int | None = None,
    clock: str = "wall",
) -> float:
    """Time of one product rows x cols x width, by default square: the unit U of every cost.

    By ``torch.mm`` into a reused buffer, without an epilogue; in strips where the matrix is too
    large. Float32 is multiplied as torch's settings say.
    """
    cols = cols or rows
    left, right = (random_rows(n, width, dtype, device) for n in (rows, cols))
    height = max(1, min(rows, BUFFER_BYTES // (cols * dtype.itemsize)))
    out = torch.empty(height, cols, dtype=dtype, device=device)

    def multiply() -> None:
        for first in range(0, rows, height):
            strip = left[first : first + height]
            torch.mm(strip, right.T, out=out[: len(strip)])

    return time_interleaved({"product": multiply}, device, SECONDS, clock)["product"].median_ms


@functools.cache
def peak_tflops(device: torch.device) -> float:
    """Rate of one large bfloat16 product, 8192 in every direction."""
    size = 8192
    return 2e-9 * size**3 / product_ms(size, size, torch.bfloat16, device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, those read and those written."""
    count = (4 << 30 if device.type == "cuda" else 64 << 20) // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    spread = time_interleaved({"copy": lambda: target.copy_(source)}, device, SECONDS)
    return 2 * 4 * count / (1e-3 * spread["copy"].median_ms)
