# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op: one table and one function.

A backend of an op is a module with plain functions, ``forward`` and where the op has one
``backward`` (``nearest`` and ``pairs`` for ``assign``), of the same signatures in every backend. A
new one is one more entry in ``MODULES``.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from kdengine.ops import extension

BACKENDS = ("auto", "cuda", "triton", "torch")
MODULES = {
    ("similarity", "torch"): "kdengine.ops.similarity_torch",
    ("similarity", "triton"): "kdengine_kernels.similarity",
    ("similarity", "cuda"): "kdengine.ops.similarity_cuda",
    ("similarity_rows", "torch"): "kdengine.ops.similarity_rows_torch",
    ("similarity_rows", "triton"): "kdengine_kernels.similarity_rows",
    ("similarity_rest", "torch"): "kdengine.ops.similarity_rest_torch",
    ("terms", "triton"): "kdengine_kernels.terms",
    ("terms", "cuda"): "kdengine.ops.terms_cuda",
    ("gradient", "torch"): "kdengine.ops.gradient_torch",
    ("gradient", "triton"): "kdengine_kernels.gradient",
    ("feature", "torch"): "kdengine.ops.feature_torch",
    ("feature", "triton"): "kdengine_kernels.feature",
    ("feature", "cuda"): "kdengine.ops.feature_cuda",
    ("moments", "torch"): "kdengine.ops.moments_torch",
    ("moments", "triton"): "kdengine_kernels.moments",
    ("moments", "cuda"): "kdengine.ops.moments_cuda",
    ("assign", "torch"): "kdengine.ops.assign_torch",
    ("assign", "triton"): "kdengine_kernels.assign",
}
# bytes of the strips, partial sums and kept logits of one call: on a CPU what its cache holds, on a
# GPU enough to fill it
WORKSPACE = {"cpu": 32 << 20, "cuda": 640 << 20, "low_memory": False}
logger = logging.getLogger("kdengine")


def choose(op: str, tensors: Sequence[Tensor], requested: str) -> ModuleType:
    """The module that runs ``op`` on these tensors.

    ``auto`` takes ``torch``, until the others have been measured to be faster on some device, and
    logs it once; a backend asked for by name runs or raises.

    Raises: ValueError for an unknown name; RuntimeError for a backend that cannot run, with why.
    """
    check_name(op, requested)
    device = tensors[0].device.type
    name = name_of(requested)
    reason = why_not(op, name, tensors)
    if reason:
        raise RuntimeError(
            f"{op}: backend {requested!r} was asked for, but {reason}; "
            "use backend='auto' or backend='torch'"
        )
    if requested == "auto":
        _log_once(op, name, device)
    return importlib.import_module(MODULES[op, name])


def name_of(requested: str) -> str:
    """The backend that ``auto`` means, or the one asked for by name."""
    return "torch" if requested == "auto" else requested


def set_workspace(num_bytes: int, *, low_memory: bool = False) -> None:
    """Bound the workspace of the ops from now on, in this process, on every device.

    It holds everything of ``similarity`` but results and saved statistics; a strip has at least 128
    rows by Triton, 16 on torch. Less workspace costs time: strips become too low to fill a GPU.
    Default: 640 MiB on a GPU, 32 MiB on a CPU.

    On top come the float32 gradients that ``similarity_rows`` keeps for its backward, and for low
    precision features the float32 sum of the keys' gradients, or the queries' where those are
    fewer, 4 D bytes each. With ``low_memory`` a sum that exceeds a quarter of the workspace is made
    in blocks of columns, for one product more a matrix (InfoNCE 5 U instead of 4, with CRD 8
    instead of 6), and losses of rows that would keep as much take the general way.

    Raises: ValueError for less than 1 MiB.
    """
    if num_bytes < 1 << 20:
        raise ValueError(
            f"set_workspace: expected at least 1 MiB (1048576 bytes); {num_bytes} came"
        )
    WORKSPACE.update(cpu=num_bytes, cuda=num_bytes, low_memory=low_memory)


def workspace(x: Tensor) -> int:
    """Bytes that an op may use beside inputs and results, on the device of ``x``."""
    return WORKSPACE["cuda" if x.is_cuda else "cpu"]


def sum_bytes(x: Tensor) -> int | None:
    """Bytes of the workspace for a float32 sum of low precision gradients; None without a limit."""
    return workspace(x) // 4 if WORKSPACE["low_memory"] else None


@contextlib.contextmanager
def running(x: Tensor) -> Iterator[None]:
    """Where a backend runs: on the device of ``x``, and without autocast, which would round."""
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with torch.autocast(x.device.type, enabled=False), device:
        yield


def check_name(op: str, requested: str) -> None:
    """Raise ValueError unless ``requested`` is the name of a backend."""
    if requested not in BACKENDS:
        raise ValueError(f"{op}: backend is one of {BACKENDS}; {requested!r} came")


def why_not(op: str, name: str, tensors: Sequence[Tensor]) -> str | None:
    """Why a backend cannot run on these tensors, or None if it can."""
    if (op, name) not in MODULES:
        return f"this build of kdengine has no {name} implementation of {op}"
    if name == "torch":
        return None
    device = tensors[0].device.type
    if name == "cuda":
        if device == "cuda" and any(x.dtype == torch.float64 for x in tensors):
            return "it computes in float32 on a GPU and a tensor is float64"
        return extension.why_not(device)
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs an NVIDIA GPU and the tensors are on {device!r}"
    if any(x.dtype == torch.float64 for x in tensors):
        return "it computes in float32 and a tensor is float64"
    module = MODULES[op, name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    return None


@functools.cache
def _log_once(op: str, name: str, device: str) -> None:
    logger.info("%s on %s runs on the %s backend", op, device, name)


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """Losses, statistics and logits are float64 if an input is, else float32."""
    is_double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def refuse_create_graph(op: str) -> None:
    """Raise RuntimeError where a backward is asked to be differentiable itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: gradients are of first order only; create_graph=True came; take second "
            "derivatives of the dense functions in kdengine.reference"
        )
