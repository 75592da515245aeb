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
    # a tile of one matrix of 16 bits: 2 blocks of 256 threads; of float, or of two: 1
    "statistics_kernel one": 128,
    "statistics_kernel two": 255,
    "gradient_kernel one": 128,
    "gradient_kernel two": 255,
    "statistics_kernel float": 255,
    "gradient_kernel float": 255,
    "finalise_kernel": 64,
}


def row_of(kernel: str) -> str:
    """A kernel's row in the table."""
    name, _, text = kernel.partition("<")
    arguments = text.rstrip(">").split(", ")
    if name in ("statistics_kernel", "gradient_kernel"):
        one = "float" if arguments[0] == "float" else "one"
        return f"{name} {one if arguments[1] == 'void' else 'two'}"
    return f"{name} {arguments[-1]}".strip()


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
        limit = REGISTERS[row_of(kernel.name)]
        if kernel.stack_bytes or kernel.registers > limit:
            wrong.append(f"{kernel} (registers at most {limit})")
    assert not wrong, "\n".join(wrong)


def test_products_of_tiles_are_made_by_tensor_cores(sass_report: ModuleType) -> None:
    kinds = ("one", "two", "float")
    kernels = [k for k in sass_report.report() if row_of(k.name).split()[-1] in kinds]
    assert len(kernels) == 2 * (6 + 8)
    # a step of a 64 x 32 tile takes 16, those of float three times as many
    assert not [k for k in kernels if k.hmma < 16 * (1 + 2 * ("<float" in k.name))]
