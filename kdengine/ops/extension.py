# SPDX-License-Identifier: Apache-2.0
"""Tensors as the extension ``kdengine._C`` takes them: addresses, shapes and where they lie."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def load() -> ModuleType:
    """``kdengine._C``.

    Raises: ImportError where it was not built or does not fit this Python.
    """
    return importlib.import_module("kdengine._C")


@functools.cache
def why_not(device: str) -> str | None:
    """Why the extension cannot run on a kind of device, or None if it can."""
    try:
        found = load()
    except ImportError as error:
        return (
            f"the extension kdengine._C cannot be imported ({error}); "
            "'pip install --editable .' with g++ on PATH builds it, with nvcc for GPUs too"
        )
    if device == "cuda" and not found.architectures:
        return (
            "the extension kdengine._C was built without nvcc; "
            "build it again with nvcc on PATH and KDENGINE_BUILD_CUDA=1"
        )
    return None


Argument = Tensor | Sequence[Tensor] | Sequence[float] | float


def call(name: str, *args: Argument) -> None:
    """Run a function of the extension where its first tensor lies.

    Lists are of tensors or of numbers. Tensors have at most two dimensions and neighbouring
    elements in a row; results among them are written. On a GPU it runs on the current stream of its
    device, on the CPU on torch's number of threads.

    Raises: ValueError for tensors on several devices, and for shapes that do not fit; RuntimeError
    for a launch that failed.
    """
    module = load()
    tensors = [x for arg in args for x in _tensors(arg)]
    device = tensors[0].device
    # one that a call leaves out may lie anywhere
    for x in tensors:
        if x.device != device and x.numel():
            raise ValueError(
                f"{name}: expected tensors on one device, {device}; {tuple(x.shape)} on {x.device} "
                "came; move it there"
            )
    # addresses keep no tensor alive: ``args`` does, until the call is over
    getattr(module, name)(*(_taken(module, x) for x in args), place(module, device))


def place(module: ModuleType, device: torch.device) -> Any:
    """Where the extension runs for tensors of a device."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        return module.Cuda(stream.cuda_stream, stream.device_index)
    return module.Cpu(torch.get_num_threads())


def _tensors(x: Argument) -> list[Tensor]:
    some = x if isinstance(x, Sequence) else [x]
    return [one for one in some if isinstance(one, Tensor)]


def _taken(module: ModuleType, x: Argument) -> Any:
    if isinstance(x, Sequence):
        return [_taken(module, one) for one in x]
    if not isinstance(x, Tensor):
        return x
    x = x.reshape(1, -1) if x.dim() < 2 else x
    assert x.shape[1] <= 1 or x.stride(1) == 1
    dtype = getattr(module.Dtype, str(x.dtype).removeprefix("torch."))
    return module.Matrix(x.data_ptr(), *x.shape, x.stride(0), dtype)
