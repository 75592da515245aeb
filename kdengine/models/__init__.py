# SPDX-License-Identifier: Apache-2.0
"""Two-tower models: build them from open_clip's architectures, freeze them, export them."""

from kdengine.models.build import build_from_spec, build_student, build_teacher, load_model
from kdengine.models.export import export_student
from kdengine.models.source import student_configs
from kdengine.models.spec import PreprocessSpec, TowerSpec, tokenizer_id
from kdengine.models.towers import Features, Student, Teacher, TwoTower

__all__ = [
    "Features",
    "PreprocessSpec",
    "Student",
    "Teacher",
    "TowerSpec",
    "TwoTower",
    "build_from_spec",
    "build_student",
    "build_teacher",
    "export_student",
    "load_model",
    "student_configs",
    "tokenizer_id",
]
