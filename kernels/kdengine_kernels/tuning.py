# SPDX-License-Identifier: Apache-2.0
"""Block sizes by kernel and operand size; no search at run time.

Every entry compiles for sm_90a without spilled registers and within 227 KiB of shared memory, every
entry with a product with WGMMA; ``tests/ops/test_compiled.py`` holds them to that. What bounds a
tile are the registers of its epilogue: 128 x 256 with one accumulator, 128 x 128 with two.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tile of the matrix, step along the width, warps, pipeline stages, rows of tiles a group."""

    rows: int
    cols: int
    k: int
    warps: int
    stages: int
    group: int = 8


# by kernel and bytes of an operand's element:
#   statistics, dual_statistics   the sweep without and with a teacher
#   keep_statistics, ...          the same of rows alone, with the logits written as well
#   row_gradient                  the gradient of these, no product
#   attend                        exponentials of rows, for a product with constant keys
#   pulls                         both strips of the op gradient
#   gradient, dual_gradient       the strip without and with a teacher in it
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
    ("gradient", 2): Config(128, 256, 64, 8, 3),
    ("gradient", 4): Config(64, 128, 32, 8, 3),
    ("gradient_exact", 2): Config(64, 256, 64, 8, 3),
    ("gradient_exact", 4): Config(64, 64, 32, 8, 3),
    ("dual_gradient", 2): Config(128, 128, 64, 8, 3),
    ("dual_gradient", 4): Config(64, 64, 32, 8, 3),
    ("dual_gradient_exact", 2): Config(64, 128, 64, 8, 3),
    ("dual_gradient_exact", 4): Config(64, 64, 32, 8, 3),
    ("targets", 2): Config(128, 256, 64, 8, 3),
    ("targets", 4): Config(64, 128, 32, 8, 3),
    ("more_targets", 2): Config(64, 128, 64, 8, 3),
    ("more_targets", 4): Config(64, 64, 32, 8, 3),
    ("more_targets_exact", 2): Config(64, 128, 64, 8, 3),
    ("more_targets_exact", 4): Config(64, 64, 32, 8, 3),
    ("targets_exact", 2): Config(64, 256, 64, 8, 3),
    ("targets_exact", 4): Config(64, 64, 32, 8, 3),
    ("residual_gradient", 2): Config(64, 128, 64, 8, 3),
    ("residual_gradient", 4): Config(64, 64, 32, 8, 3),
    ("residual_gradient_exact", 2): Config(64, 128, 64, 8, 3),
    ("residual_gradient_exact", 4): Config(64, 64, 32, 8, 3),
}


def config(kernel: str, itemsize: int) -> Config:
    """The blocks of a kernel for operands of ``itemsize`` bytes."""
    return TABLE[kernel, itemsize]


def two_phase(width: int, num_teachers: int) -> bool:
    """Whether gradients are made in two phases; a tile holds at most one teacher."""
    return num_teachers > 1
