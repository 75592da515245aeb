# SPDX-License-Identifier: Apache-2.0
"""Compile every entry of the tuning table for a GPU that need not be there.

    PYTHONPATH=kernels python -m kdengine_kernels.offline [--json]

Prints registers, bytes spilled, shared memory and the kind of tensor-core instruction of each
kernel: what one looks at before and after a change of blocks or epilogue.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdengine_kernels.assign import SHORT, _nearest_kernel, _pairs_kernel
from kdengine_kernels.feature import _feature_backward_kernel, _feature_forward_kernel
from kdengine_kernels.gradient import _pulls_kernel
from kdengine_kernels.moments import COLS, ROWS, _moments_gradient_kernel, _moments_kernel
from kdengine_kernels.similarity_attend import _attend_kernel
from kdengine_kernels.similarity_finalise import _finalise_kernel
from kdengine_kernels.similarity_gradient import _gradient_kernel
from kdengine_kernels.similarity_gradient_vectors import _coefficients_kernel, _positives_kernel
from kdengine_kernels.similarity_rows import GAIN, _row_gradient_kernel
from kdengine_kernels.similarity_statistics import _statistics_kernel
from kdengine_kernels.similarity_strips import COEFFICIENTS_BLOCK, POSITIVES_BLOCK
from kdengine_kernels.similarity_sweep import FINALISE
from kdengine_kernels.terms import BLOCK, _terms_backward_kernel, _terms_forward_kernel
from kdengine_kernels.tuning import TABLE, Config

CAPABILITY = 90
WIDTH, TEACHER_WIDTH = 512, 768
DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}
INT32 = {"flag", "index", "first", "second"}
INT64 = {"labels", "row_labels", "col_labels", "starts", "counts"}
SIZE = re.compile(r"(num|first|end|all)_\w+|\w+_(stride|slot|limit)|part_cols|width")
# of a feature each, and of these one for each tower or side
ROW = {"left", "right", "teacher_left", "teacher_right", "student"}
EACH = {"students", "teachers", "units", "grad_units", "outs", "sides"}
TOWERS = 2
# of strips, whose rows begin at multiples of 16 elements
ALIGNED = {"out_stride", "logits_stride"}


class Usage(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        kind: entry of the tuning table.
        dtype: of the features.
        registers: of a thread.
        stack_bytes: of a thread; more than 0 means spilled registers.
        shared_bytes: of a program.
        wgmma: whether products use Hopper's warp group instructions.
    """

    kind: str
    dtype: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: bool


def cases() -> Iterator[tuple[str, str, Config, Any, dict[str, Any]]]:
    """Each entry of the table with its kernel and flags, the rare repetitions included."""
    for (kind, itemsize), blocks in TABLE.items():
        for dtype in DTYPES[itemsize]:
            if kind.startswith("nearest"):
                slots = 128 if kind == "nearest_many" else SHORT
                yield kind, dtype, blocks, _nearest_kernel, {"SLOTS": slots}
                continue
            if kind.endswith("pairs"):
                fill = kind == "write_pairs"
                yield kind, dtype, blocks, _pairs_kernel, {"FILL": fill, "TRIANGLE": True}
                continue
            if kind == "pulls":
                if dtype != "fp16":
                    yield kind, dtype, blocks, _pulls_kernel, {}
                continue
            if kind == "attend":
                # here as there, float16 features are multiplied as float32
                if dtype != "fp16":
                    for exact in (False, True):
                        name = kind + " (repeated)" * exact
                        yield name, dtype, blocks, _attend_kernel, {"EXACT": exact}
                continue
            if kind == "row_gradient":
                factor = GAIN if dtype == "fp16" else 1.0
                yield kind, dtype, blocks, _row_gradient_kernel, {"SOFT": True, "FACTOR": factor}
                continue
            if "statistics" in kind:
                soft, keep = "dual" in kind, kind.startswith("keep")
                common = {"ROWS": True, "COLS": not keep, "MEANS": False}
                common |= {"SOFT_ROWS": soft, "SOFT_COLS": soft and not keep}
                for online in (False, True):
                    flags = common | {"KEEP": keep and not online, "ONLINE": online}
                    name = kind + " (repeated)" * online
                    yield name, dtype, blocks, _statistics_kernel, flags
                continue
            student, soft = kind.startswith(("gradient", "dual", "residual")), False
            soft = kind.startswith(("dual", "targets", "more_targets"))
            flags = {"ROWS": student, "COLS": student, "SOFT_ROWS": soft, "SOFT_COLS": soft}
            flags |= {
                "RESIDUAL": kind.startswith(("residual", "more")),
                "EXACT": kind.endswith("_exact"),
            }
            flags |= {"UNIT": student and dtype == "fp16"}
            yield kind, dtype, blocks, _gradient_kernel, flags


def small_cases() -> Iterator[tuple[str, str, Config, Any, dict[str, Any]]]:
    """What has no entry in the table: kernels of vectors, where blocks matter little."""
    both = {"ROWS": True, "COLS": True, "SOFT_ROWS": True, "SOFT_COLS": True}
    terms = {"HARD_ROWS": True, "HARD_COLS": True, "SOFT_ROWS": 1, "SOFT_COLS": 1, "BLOCK": BLOCK}
    ends = both | {"MEANS": False, "FIRST": True, "LAST": True} | FINALISE
    fixes = {"ROWS": True, "COLS": True, "ROW_TEACHERS": 1, "COL_TEACHERS": 1}
    blocks = Config(0, 0, 0, 4, 3)
    for dtype in ("bf16", "fp32"):
        yield "finalise", dtype, blocks, _finalise_kernel, ends | {"ONLINE": False}
        yield "finalise (repeated)", dtype, blocks, _finalise_kernel, ends | {"ONLINE": True}
        fixes |= {"UNIT": False, "BLOCK": POSITIVES_BLOCK}
        yield "positives", dtype, blocks, _positives_kernel, fixes
    coefficients = both | {"BLOCK": COEFFICIENTS_BLOCK}
    yield "coefficients", "fp32", blocks, _coefficients_kernel, coefficients
    yield "terms", "fp32", blocks, _terms_forward_kernel, terms
    yield "terms_backward", "fp32", blocks, _terms_backward_kernel, terms
    for dtype in ("bf16", "fp16", "fp32"):
        common, one = {"NORMALIZE": True, "BLOCK": WIDTH}, Config(0, 0, 0, 1, 3)
        yield "feature", dtype, one, _feature_forward_kernel, common | {"UNIT": True}
        units = common | {"UNITS": (True,) * TOWERS}
        yield "feature_backward", dtype, one, _feature_backward_kernel, units
        sizes = {"ROWS": ROWS, "COLS": COLS}
        yield "moments", dtype, blocks, _moments_kernel, sizes
        sizes = sizes | {"COLS": 4 * COLS}
        yield "moments_gradient", dtype, blocks, _moments_gradient_kernel, sizes


def build(kernel: Any, dtype: str, blocks: Config, flags: dict[str, Any]) -> Any:
    """Compile one kernel as its launcher would."""
    precision = "tf32x3" if dtype == "fp32" else "tf32"
    constants = {
        "WIDTH": WIDTH,
        "TEACHER_WIDTH": TEACHER_WIDTH,
        "WIDE": 2 * WIDTH,
        "TMA": True,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLS": blocks.cols,
        "BLOCK_K": blocks.k,
        "GROUP": blocks.group,
        "PIECES": blocks.pieces,
        "PRECISION": precision,
        "TEACHER_PRECISION": precision,
        **flags,
    }
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    # of sums in float32
    sums = (flags.get("SOFT_ROWS") and flags.get("ROWS") is False) or kernel is _moments_kernel
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            is_tuple = isinstance(constants[name], tuple)
            signature[name] = ("constexpr",) * TOWERS if is_tuple else "constexpr"
        elif name in EACH:
            signature[name] = (f"*{dtype}",) * TOWERS
        elif name.endswith("strides"):
            signature[name] = ("i32",) * TOWERS
        elif SIZE.fullmatch(name):
            signature[name] = "i32"
        elif name.endswith("query"):
            signature[name] = f"tensordesc<{dtype}[{blocks.rows}, {blocks.k}]>"
        elif name.endswith("key"):
            signature[name] = f"tensordesc<{dtype}[{blocks.cols}, {blocks.k}]>"
        elif name in ROW or (name in ("out", "g_out", "a_out") and not sums):
            signature[name] = f"*{dtype}"
        elif name.endswith("_share"):
            signature[name] = "fp32"
        elif name in INT64:
            signature[name] = "*i64"
        else:
            signature[name] = "*i32" if name in INT32 else "*fp32"
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if str(signature[name]).startswith("*") or name in ALIGNED
    }
    aligned |= {
        (kernel.arg_names.index(name), i): [["tt.divisibility", 16]]
        for name in EACH.intersection(kernel.arg_names)
        for i in range(TOWERS)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def measure(kind: str, dtype: str, blocks: Config, kernel: Any, flags: dict[str, Any]) -> Usage:
    """Compile one case and read what it uses."""
    compiled = build(kernel, dtype, blocks, flags)
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", binary.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return Usage(
        kind,
        dtype,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        "wgmma.mma_async" in compiled.asm["ptx"],
    )


def main() -> None:
    """Print one line a case, as a table or as JSON."""
    as_json = "--json" in sys.argv[1:]
    if not as_json:
        print(f"{'kernel':34} {'dtype':5} {'registers':>9} {'stack':>6} {'shared':>7}  wgmma")
    for case in (*cases(), *small_cases()):
        usage = measure(*case)
        if as_json:
            print(json.dumps(usage._asdict()), flush=True)
        else:
            kind, dtype, registers, stack, shared, wgmma = usage
            print(f"{kind:34} {dtype:5} {registers:9} {stack:6} {shared:7}  {wgmma}", flush=True)


if __name__ == "__main__":
    main()
