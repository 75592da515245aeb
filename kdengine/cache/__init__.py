# SPDX-License-Identifier: Apache-2.0
"""Teacher embeddings computed once: k stored crops of every image, and every caption."""

from kdengine.cache.build import Summary, build_cache
from kdengine.cache.manifest import Manifest, TeacherEntry, check_teachers, hash_file
from kdengine.cache.store import Store
from kdengine.cache.teachers import CachedTeachers

__all__ = [
    "CachedTeachers",
    "Manifest",
    "Store",
    "Summary",
    "TeacherEntry",
    "build_cache",
    "check_teachers",
    "hash_file",
]
