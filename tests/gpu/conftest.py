# SPDX-License-Identifier: Apache-2.0
"""Tests for a machine with one NVIDIA GPU (``pytest -m gpu``); elsewhere they say so and skip."""

import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder; a hook of a conftest sees the tests of all folders."""
    reason = "needs an NVIDIA GPU, and torch.cuda.is_available() is false"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _kernels_are_compiled() -> None:
    """Kernels that were made for the interpreter would run on the CPU and test nothing here."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "run with TRITON_INTERPRET=0"


@pytest.fixture(scope="session")
def picture() -> Callable[[int, tuple[int, int]], Image.Image]:
    """``picture(number, (width, height))``: colours and noise, so that a shift by a pixel shows."""

    def draw(number: int, size: tuple[int, int]) -> Image.Image:
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(32, 224, (6, 8, 3), np.uint8)).resize(size)
        fine = random.integers(-30, 31, (size[1], size[0], 1))
        return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))

    return draw


@pytest.fixture(scope="session")
def write_shard() -> Callable[[Path, Sequence[Mapping[str, bytes]]], str]:
    """``write_shard(path, samples)``: a tar of samples, each its members by extension."""

    def write(path: Path, samples: Sequence[Mapping[str, bytes]]) -> str:
        with tarfile.open(path, "w") as tar:
            for number, sample in enumerate(samples):
                for extension, data in sample.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return str(path)

    return write


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """``encode(image, format, **options)``: the bytes of an image file."""

    def write(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return write
