# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine doctor`` prints: what this machine can run, and why not the rest."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdengine import __version__
from kdengine.ops import _backend, extension

# distributions and what each is for; the optional ones last
NEEDED = {
    "triton": "backend triton",
    "open_clip_torch": "models and tokenizers",
    "timm": "image towers",
    "deepspeed": "training",
    "nvidia-dali-cuda130": "decoding and crops",
}


def diagnosis() -> Group:
    """Versions, devices, compilers, and each op on each backend, for the device training takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: list[RenderableType] = [Text(line) for line in (*_versions(), *_devices(), *_build())]
    table, reasons = _backends(device)
    parts += [Text(), table]
    parts += [Text(f"{number}  {reason}") for reason, number in reasons.items()]
    return Group(*parts)


def _versions() -> list[str]:
    found = [f"kdengine {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}"]
    for name, purpose in NEEDED.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)} ({purpose})")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}: not installed, needed for {purpose}; pip install {name}")
    return found


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} sees none" if built else "this torch is built without CUDA"
        )
        return [f"no NVIDIA GPU: {why}", f"CPU: {os.cpu_count()} cores"]
    found = []
    for number in range(torch.cuda.device_count()):
        x = torch.cuda.get_device_properties(number)
        found.append(
            f"GPU {number}: {x.name}, {x.total_memory / 2**30:.0f} GiB, sm_{x.major}{x.minor}, "
            f"{x.multi_processor_count} multiprocessors"
        )
    return found


def _build() -> list[str]:
    compilers = [name for name in ("g++", "nvcc") if shutil.which(name)]
    on_path = f"on PATH: {', '.join(compilers) or 'neither g++ nor nvcc'}"
    reason = extension.why_not("cpu")
    if reason:
        return [f"extension: {reason} ({on_path})"]
    architectures = extension.load().architectures
    kind = f"with CUDA for {architectures}" if architectures else "for the CPU alone"
    return [f"extension kdengine._C: built {kind} ({on_path})"]


def _backends(device: str) -> tuple[Table, dict[str, int]]:
    """A row an op; the reasons of what cannot run, numbered."""
    table = Table(title=f"ops on {device}: which backend can run", title_justify="left")
    for column in ("op", "auto", *_backend.BACKENDS[1:]):
        table.add_column(column)
    reasons: dict[str, int] = {}
    tensors = [torch.empty(1, 1, device=device)]
    for op in dict.fromkeys(op for op, _ in _backend.MODULES):
        cells = []
        for backend in _backend.BACKENDS[1:]:
            reason = _backend.why_not(op, backend, tensors)
            # the same for every op
            reason = reason and reason.replace(f" of {op}", "")
            number = reasons.setdefault(reason, len(reasons) + 1) if reason else None
            cells.append(f"no ({number})" if number else "yes")
        auto = _backend.name_of("auto")
        table.add_row(op, auto if (op, auto) in _backend.MODULES else "none", *cells)
    return table, reasons
