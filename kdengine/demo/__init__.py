# SPDX-License-Identifier: Apache-2.0
"""The demo: data that it draws itself, a teacher, and what its student gains from it."""

from kdengine.demo.run import main
from kdengine.demo.shards import Sizes, render_data

__all__ = ["Sizes", "main", "render_data"]
