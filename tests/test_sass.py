# SPDX-License-Identifier: Apache-2.0
"""The machine code of the extension's kernels: no spills, and registers within a table."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from kdengine.ops import extension

REASON = extension.why_not("cuda")
pytestmark = pytest.mark.skipif(bool(REASON), reason=str(REASON))
# registers of a thread at most, by kernel: what a multiprocessor's 64 K allow for its blocks
REGISTERS = {
    # rows in the cache: 4 blocks of 256 threads
    "forward_kernel 0": 64,
    "backward_kernel 0": 64,
    # rows in registers: 2 blocks
    "forward_kernel 4": 128,
    "backward_kernel 4": 128,
}


@pytest.fixture(scope="module")
def sass_report(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "sass_report.py"
    spec = importlib.util.spec_from_file_location("sass_report", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_spills_or_takes_more_registers_than_its_table_says(
    sass_report: ModuleType,
) -> None:
    kernels = sass_report.report()
    assert len({kernel.architecture for kernel in kernels}) == 2
    wrong = []
    for kernel in kernels:
        name, _, arguments = kernel.name.partition("<")
        limit = REGISTERS[f"{name} {arguments.rstrip('>').split(', ')[-1]}"]
        if kernel.stack_bytes or kernel.registers > limit:
            wrong.append(f"{kernel} (registers at most {limit})")
    assert not wrong, "\n".join(wrong)
