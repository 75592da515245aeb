# SPDX-License-Identifier: Apache-2.0
"""The papers' methods: one file each, all built by ``build_method``."""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from kdengine import config
from kdengine.distributed import Exchange, Group
from kdengine.methods.base import Distillation, Embeddings, Method, joined, teacher_missing
from kdengine.methods.classes import ClassDistillation, ClassMethod
from kdengine.methods.clip import Clip
from kdengine.methods.clip_cid import ClipCID
from kdengine.methods.clip_kd import ClipKD
from kdengine.methods.comkd import ComKD, ComKDTeacher
from kdengine.methods.tinyclip import TinyClip
from kdengine.models import TwoTower

__all__ = [
    "ClassDistillation",
    "ClassMethod",
    "Clip",
    "ClipCID",
    "ClipKD",
    "ComKD",
    "ComKDTeacher",
    "Distillation",
    "Embeddings",
    "Method",
    "TinyClip",
    "build_method",
    "build_root",
    "joined",
    "needs_teacher",
    "teacher_missing",
]

METHODS: dict[str, type[Method] | type[ClassMethod]] = {
    "clip": Clip,
    "clip_kd": ClipKD,
    "tinyclip": TinyClip,
    "clip_cid": ClipCID,
    "comkd_teacher": ComKDTeacher,
    "comkd": ComKD,
}


def needs_teacher(method: config.Method) -> bool:
    """Whether the configured method wants a teacher."""
    if method.name == "clip_cid":
        return method.clip_cid.asks_teacher
    return METHODS[method.name].needs_teacher


def build_method(
    method: config.Method,
    *,
    student_width: int,
    teacher_widths: Sequence[int],
    class_tokens: Tensor | None = None,
    centre_width: int | None = None,
    group: Group | Exchange = None,
) -> Method | ClassMethod:
    """Build the configured method.

    Args:
        method: the configuration; its field named like the method holds the method's own settings.
        student_width: width of the student's embeddings.
        teacher_widths: width of each teacher's, empty without a teacher.
        class_tokens: [N, context], the texts of the classes, for methods that encode them.
        centre_width: of the teacher's centroids, for a method that compares the student with them.
        group: the ranks that share a batch, or how features travel between them.

    Raises:
        ValueError: the method needs a teacher and there is none.
    """
    if method.name == "clip":
        return Clip(group=group)
    if method.name == "comkd_teacher":
        assert class_tokens is not None
        return ComKDTeacher(class_tokens)
    if not teacher_widths and needs_teacher(method):
        raise teacher_missing(method.name)
    if method.name == "tinyclip":
        own = method.tinyclip
        scale = own.scale or None
        return TinyClip(len(teacher_widths), alpha=own.alpha, scale=scale, group=group)
    if method.name == "clip_cid":
        return _clip_cid(method.clip_cid, student_width, centre_width, group)
    if method.name == "comkd":
        comkd = method.comkd
        return ComKD(
            kl=comkd.kl,
            kl_reduction=comkd.kl_reduction,
            temperature=comkd.temperature,
            align=comkd.align,
            group=group,
        )
    return ClipKD(student_width, teacher_widths, **asdict(method.clip_kd), group=group)


def _clip_cid(
    own: config.ClipCID, student_width: int, centre_width: int | None, group: Group | Exchange
) -> ClipCID:
    return ClipCID(
        student_width,
        centre_width,
        task=own.task,
        instance=own.instance,
        cluster=own.cluster,
        cluster_kl=own.cluster_kl,
        teacher_scale=own.teacher_scale if own.targets == "teacher" else None,
        temperature=own.temperature,
        scale=own.scale or None,
        margin=own.margin,
        positives=own.positives,
        group=group,
    )


def build_root(student: TwoTower, method: Method | ClassMethod) -> Distillation | ClassDistillation:
    """Student and method in the one module that the training engine sees."""
    if isinstance(method, ClassMethod):
        return ClassDistillation(student, method)
    return Distillation(student, method)
