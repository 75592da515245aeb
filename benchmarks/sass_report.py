# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel of the extension uses, read from its machine code; no GPU is needed.

    python benchmarks/sass_report.py [--json]

A line a kernel and architecture: registers of a thread, bytes of its stack and local memory (more
than 0 means spilled registers), static shared memory of a block, and instructions in its code:
tensor-core ones, HMMA (mma.sync) and HGMMA (wgmma, Hopper alone), and accesses of 16 bytes (wide).
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from kdengine.ops import extension  # noqa: E402


class Kernel(NamedTuple):
    """One kernel, compiled for one architecture.

    Attributes:
        name: with its template arguments.
        architecture: as ``sm_90a``.
        registers: of a thread.
        stack_bytes: of a thread, local memory included.
        shared_bytes: of a block, without what a launch adds.
        hmma: instructions of this kind in the code.
        hgmma: likewise.
        wide: reads and writes of 16 bytes of global memory.
    """

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    hmma: int
    hgmma: int
    wide: int


def tool() -> str:
    """``cuobjdump``, from PATH or from Triton's package.

    Raises: RuntimeError where there is none.
    """
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.exists():
            return str(inside)
    raise RuntimeError("sass_report: no cuobjdump on PATH nor in Triton; install the CUDA toolkit")


def report() -> list[Kernel]:
    """All kernels of the built extension.

    Raises: RuntimeError where it holds none.
    """
    reason = extension.why_not("cuda")
    if reason:
        raise RuntimeError(f"sass_report: {reason}")
    found = []
    path = str(extension.load().__file__)
    for architecture in sorted(set(re.findall(r"\.(sm_\w+)\.cubin", _run("-lelf", path)))):
        found += _kernels(path, architecture)
    return found


def _kernels(path: str, architecture: str) -> list[Kernel]:
    usage = _run("--dump-resource-usage", "-arch", architecture, path)
    counts: dict[str, list[int]] = {}
    name = ""
    for line in _run("-sass", "-arch", architecture, path).splitlines():
        if start := re.match(r"\s*Function : (\S+)", line):
            name = start[1]
            counts[name] = [0, 0, 0]
        elif name:
            counts[name][0] += bool(re.search(r"\bHMMA\b", line))
            counts[name][1] += bool(re.search(r"\bHGMMA\b", line))
            counts[name][2] += bool(re.search(r"\b(LDG|STG)\.E\.[A-Z.]*128\b", line))
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    rows = re.findall(pattern, usage)
    names = _demangled([row[0] for row in rows])
    return [
        Kernel(name, architecture, int(reg), int(stack) + int(local), int(shared), *counts[symbol])
        for name, (symbol, reg, stack, shared, local) in zip(names, rows, strict=True)
    ]


def _demangled(symbols: list[str]) -> list[str]:
    """``forward_kernel<Bf16, float, 4>``: without namespaces, arguments and result."""
    plain = symbols
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
        plain = text.stdout.split("\n")[: len(symbols)]
    short = []
    for name in plain:
        name = re.sub(r"kdengine::|\(anonymous namespace\)::|void |\((int|bool)\)", "", name)
        short.append(re.sub(r"\(.*$", "", name))
    return short


def _run(*words: str) -> str:
    return subprocess.run([tool(), *words], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args()
    kernels = report()
    if args.json:
        for kernel in kernels:
            print(json.dumps(kernel._asdict()))
        return
    width = max(len(kernel.name) for kernel in kernels)
    print(f"{'kernel':{width}}  arch     registers  stack  shared  HMMA  HGMMA  wide")
    for k in kernels:
        print(
            f"{k.name:{width}}  {k.architecture:7}  {k.registers:9}  {k.stack_bytes:5}  "
            f"{k.shared_bytes:6}  {k.hmma:4}  {k.hgmma:5}  {k.wide:4}"
        )


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
