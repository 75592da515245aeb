# SPDX-License-Identifier: Apache-2.0
"""Block sizes by kernel and operand size; no search at run time.

Every entry compiles for sm_90a without spilled registers and within 227 KiB of shared memory, every
entry with a product with WGMMA; ``tests/ops/test_compiled.py`` holds them to that. What bounds a
tile are its registers: 128 x 256 with one accumulator, 128 x 128 with two, and what its epilogue
loads beside them, which pieces make less.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Config(NamedTuple):
    """Tile of the matrix, step along the width, warps, pipeline stages, rows of tiles a group.

    ``pieces`` of a tile's columns go through its epilogue one after the other.
    """

    rows: int
    cols: int
    k: int
    warps: int
    stages: int
    group: int = 8
    pieces: int = 1


# by kernel and bytes of an operand's element:
#   statistics, dual_statistics   the sweep without and with a teacher
#   keep_statistics, ...          the same of rows alone, with the logits written as well
#   row_gradient                  the gradient of these, no product
#   attend                        exponentials of rows, for a product with constant keys
#   pulls                         both strips of the op gradient
#   gradient, dual_gradient       the strip without and with a teacher in it
#   nearest, nearest_many         short and long lists of the greatest of a row
#   pairs, write_pairs            the passes of a range-join that count and that write
#   targets, more_targets         the first teacher's part alone, and further ones added to it
#   residual_gradient             the student added to them
# the same with "_exact" are what a raised flag asks for: rare, so safe rather than fast
TABLE = {
    ("statistics", 2): Config(64, 256, 64, 8, 3),
    ("statistics", 4): Config(64, 128, 32, 8, 3),
    ("dual_statistics", 2): Config(64, 128, 64, 8, 3),
    ("dual_statistics", 4): Config(64, 64, 32, 8, 3),
    ("keep_statistics", 2): Config(128, 256, 64, 8, 3),
    ("keep_statistics", 4): Config(128, 128, 32, 8, 3),
    ("keep_dual_statistics", 2): Config(64, 128, 64, 8, 3),
    ("keep_dual_statistics", 4): Config(64, 128, 32, 8, 3),
    ("row_gradient", 2): Config(8, 512, 1, 8, 1),
    ("row_gradient", 4): Config(8, 512, 1, 8, 1),
    ("attend", 2): Config(64, 256, 64, 8, 3),
    ("attend", 4): Config(64, 128, 32, 8, 3),
    ("pulls", 2): Config(64, 128, 64, 8, 3),
    ("pulls", 4): Config(64, 64, 32, 8, 3),
    ("nearest", 2): Config(128, 128, 64, 8, 3),
    ("nearest", 4): Config(64, 128, 32, 8, 3),
    ("nearest_many", 2): Config(64, 128, 64, 8, 3),
    ("nearest_many", 4): Config(64, 64, 32, 8, 3),
    ("pairs", 2): Config(128, 128, 64, 8, 3),
    ("pairs", 4): Config(64, 128, 32, 8, 3),
    ("write_pairs", 2): Config(64, 64, 64, 8, 3),
    ("write_pairs", 4): Config(64, 64, 32, 8, 3),
    ("gradient", 2): Config(128, 256, 64, 8, 3),
    ("gradient", 4): Config(128, 128, 32, 8, 3),
    ("gradient_exact", 2): Config(64, 256, 64, 8, 3),
    ("gradient_exact", 4): Config(64, 64, 32, 8, 3),
    ("dual_gradient", 2): Config(128, 128, 64, 8, 3, pieces=2),
    ("dual_gradient", 4): Config(128, 128, 32, 8, 3, pieces=4),
    ("dual_gradient_exact", 2): Config(64, 128, 64, 8, 3),
    ("dual_gradient_exact", 4): Config(64, 64, 32, 8, 3),
    ("targets", 2): Config(128, 256, 64, 8, 3, pieces=2),
    ("targets", 4): Config(128, 128, 32, 8, 3),
    ("more_targets", 2): Config(128, 256, 64, 8, 3, pieces=8),
    ("more_targets", 4): Config(128, 128, 32, 8, 3, pieces=2),
    ("more_targets_exact", 2): Config(64, 128, 64, 8, 3),
    ("more_targets_exact", 4): Config(64, 64, 32, 8, 3),
    ("targets_exact", 2): Config(64, 256, 64, 8, 3),
    ("targets_exact", 4): Config(64, 64, 32, 8, 3),
    ("residual_gradient", 2): Config(128, 256, 64, 8, 3, pieces=8),
    ("residual_gradient", 4): Config(128, 128, 32, 8, 3, pieces=2),
    ("residual_gradient_exact", 2): Config(64, 128, 64, 8, 3),
    ("residual_gradient_exact", 4): Config(64, 64, 32, 8, 3),
}


def config(kernel: str, itemsize: int) -> Config:
    """The blocks of a kernel for operands of ``itemsize`` bytes."""
    return TABLE[kernel, itemsize]


# How a strip's gradient with one teacher is made: in one phase, "G1", or in two, "G2". By bytes of
# an element, width of the student and width of the teacher (up to 512, 768, 1024 and beyond).
# PREDICTED, not measured: no GPU has run it. ``benchmarks/bench_similarity.py`` times both.
WIDTHS = (512, 768)
VARIANTS = {
    2: {
        #      teacher up to 512, 768, 1024
        512: ("G2", "G2", "G1"),
        768: ("G2", "G2", "G1"),
        1024: ("G1", "G1", "G1"),
    },
    # two phases have no larger tiles there
    4: {
        512: ("G1", "G1", "G1"),
        768: ("G1", "G1", "G1"),
        1024: ("G1", "G1", "G1"),
    },
}


# below this height, reading and writing the keys' sum for every strip costs more than G2 can gain
LEAST_ROWS = 1024


def two_phase(width: int, teacher_widths: Sequence[int], itemsize: int, has_room: bool) -> bool:
    """Whether a strip's gradient is made in two phases; a tile holds at most one teacher.

    ``has_room``: the workspace holds ``LEAST_ROWS`` of a strip and of its targets, or all rows.
    """
    if len(teacher_widths) != 1:
        return len(teacher_widths) > 1
    row = next((w for w in WIDTHS if width <= w), 1024)
    col = sum(teacher_widths[0] > w for w in WIDTHS)
    return VARIANTS[itemsize][row][col] == "G2" and has_room
