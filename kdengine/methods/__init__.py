# SPDX-License-Identifier: Apache-2.0
"""The papers' methods: one file each, all built by ``build_method``."""

from collections.abc import Sequence
from dataclasses import asdict

from kdengine import config
from kdengine.distributed import Exchange, Group
from kdengine.methods.base import Distillation, Embeddings, Method, joined, teacher_missing
from kdengine.methods.clip import Clip
from kdengine.methods.clip_kd import ClipKD
from kdengine.methods.tinyclip import TinyClip

__all__ = [
    "Clip",
    "ClipKD",
    "Distillation",
    "Embeddings",
    "Method",
    "TinyClip",
    "build_method",
    "joined",
    "needs_teacher",
    "teacher_missing",
]

METHODS: dict[str, type[Method]] = {"clip": Clip, "clip_kd": ClipKD, "tinyclip": TinyClip}


def needs_teacher(name: str) -> bool:
    """Whether the method of this name wants a teacher."""
    return METHODS[name].needs_teacher


def build_method(
    method: config.Method,
    *,
    student_width: int,
    teacher_widths: Sequence[int],
    group: Group | Exchange = None,
) -> Method:
    """Build the configured method.

    Args:
        method: the configuration; its field named like the method holds the method's own settings.
        student_width: width of the student's embeddings.
        teacher_widths: width of each teacher's, empty without a teacher.
        group: the ranks that share a batch, or how features travel between them.

    Raises:
        ValueError: the method needs a teacher and there is none.
    """
    if method.name == "clip":
        return Clip(group=group)
    if not teacher_widths:
        raise teacher_missing(method.name)
    if method.name == "tinyclip":
        own = method.tinyclip
        scale = own.scale or None
        return TinyClip(len(teacher_widths), alpha=own.alpha, scale=scale, group=group)
    return ClipKD(student_width, teacher_widths, **asdict(method.clip_kd), group=group)
