# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: save everything, resume exactly, export the student.

    RUN/checkpoints/latest                     name of the newest complete checkpoint
    RUN/checkpoints/step_00000050/run.json     step, counters, ranks, configuration, model specs
                                  student.safetensors   the student alone, fp32, open_clip's names
                                  rank_00000.pt         random states and data position of a rank
                                  masks.pt              of a student that is being pruned
                                  engine/               DeepSpeed's files: model, heads, optimiser

A checkpoint is written as ``.partial_step_N`` and renamed when all ranks have finished and synced
it, so a folder named ``step_N`` is complete, whenever the run was killed. ``latest`` is replaced
after the rename, for people to read: ``--run.resume latest`` looks at the folders.
``--run.resume`` of an older checkpoint starts another history: later ones are renamed to
``superseded_step_N``, never deleted.
"""

from kdengine.checkpoint.folder import checkpoints, clean, find, read_meta, step_name
from kdengine.checkpoint.masters import clamp_masters, student_weights, whole_weights
from kdengine.checkpoint.resume import check, differences, starting_point
from kdengine.checkpoint.state import State, random_state, set_random_state
from kdengine.checkpoint.store import export_run, export_weights, load, save, saved_student

__all__ = [
    "State",
    "check",
    "checkpoints",
    "clamp_masters",
    "clean",
    "differences",
    "export_run",
    "export_weights",
    "find",
    "load",
    "random_state",
    "read_meta",
    "save",
    "saved_student",
    "set_random_state",
    "starting_point",
    "step_name",
    "student_weights",
    "whole_weights",
]
