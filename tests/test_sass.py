# SPDX-License-Identifier: Apache-2.0
"""The machine code of the extension's kernels: no spills, and no more than the tables say."""

import importlib.util
from pathlib import Path
from typing import Any

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
    # eight rows of a lane in registers: 2 blocks; parts, or a row at a time: 4
    "moments_kernel": 128,
    "moments_merge_kernel": 64,
    "moments_gradient_kernel": 64,
    # 1 block of 1024 threads; 4 of 256
    "terms_kernel": 64,
    "terms_gradient_kernel": 64,
}
# bytes of shared memory that a block has without asking; what a driver keeps of it included
SHARED = {
    "finalise_kernel": 5 << 10,
    "moments_kernel": 18 << 10,
    "moments_merge_kernel": 18 << 10,
    "terms_kernel": 2 << 10,
}
# accesses of 16 bytes in the code at least: what a lane reads and writes of full pieces
WIDE = {
    "forward_kernel": 6,
    "backward_kernel": 8,
    "moments_kernel": 8,
    "moments_gradient_kernel": 2,
}


def row_of(kernel: str) -> str:
    """A kernel's row in the table."""
    name, _, text = kernel.partition("<")
    arguments = text.rstrip(">").split(", ")
    if name in ("statistics_kernel", "gradient_kernel"):
        one = "float" if arguments[0] == "float" else "one"
        return f"{name} {one if arguments[1] == 'void' else 'two'}"
    if name.startswith(("moments", "terms")):
        return name
    return f"{name} {arguments[-1]}".strip()


@pytest.fixture(scope="module")
def kernels(repository: Path) -> list[Any]:
    """What ``sass_report`` reads, once: it takes seconds."""
    path = repository / "benchmarks" / "sass_report.py"
    spec = importlib.util.spec_from_file_location("sass_report", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.report()


def test_no_kernel_spills_or_takes_more_than_its_table_says(kernels: list[Any]) -> None:
    assert len({kernel.architecture for kernel in kernels}) == 2
    wrong = []
    for kernel in kernels:
        row = row_of(kernel.name)
        limit, shared = REGISTERS[row], SHARED.get(row, 1 << 10)
        if kernel.stack_bytes or kernel.registers > limit or kernel.shared_bytes > shared:
            wrong.append(f"{kernel} (registers at most {limit}, shared at most {shared})")
    assert not wrong, "\n".join(wrong)


def test_rows_are_read_and_written_16_bytes_at_a_time(kernels: list[Any]) -> None:
    found = [k for k in kernels if row_of(k.name).split()[0] in WIDE]
    assert len(found) == 2 * (2 * 2 * 9 + 2 * 3)
    assert not [k for k in found if k.wide < WIDE[row_of(k.name).split()[0]]]


def test_products_of_tiles_are_made_by_tensor_cores(kernels: list[Any]) -> None:
    kinds = ("one", "two", "float")
    found = [k for k in kernels if row_of(k.name).split()[-1] in kinds]
    assert len(found) == 2 * (6 + 8)
    # a step of a 64 x 32 tile takes 16, those of float three times as many
    assert not [k for k in found if k.hmma < 16 * (1 + 2 * ("<float" in k.name))]
