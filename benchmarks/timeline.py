# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes, watched from outside: no code of a loop is changed.

A timeline is a list of marks; every moment belongs to the phase that was marked last. On a GPU the
marks are CUDA events of the current stream. Loops wait for the GPU at the end of a step, so what
the host spends on data shows as a gap of the stream.
"""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from kdengine.job import Job

# in the order of a step
PHASES = ("data", "teacher", "image tower", "text tower", "loss", "backward", "update")
# a step begins with its data; what is between named phases; what is between steps
FIRST, OTHER, END = PHASES[0], "other", "end"


class Timeline:
    """Marks of the phases of many steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """From now on it is this phase; one that goes on is not marked again."""
        if self._marks and self._marks[-1][0] == phase:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a phase of its own."""

        def marked(*arguments: Any, **options: Any) -> Any:
            self.mark(phase)
            found = function(*arguments, **options)
            self.mark(OTHER)
            return found

        return marked

    def watch_module(self, phase: str, module: nn.Module) -> None:
        """Calls of the module are a phase."""
        module.register_forward_pre_hook(lambda *_: self.mark(phase))
        module.register_forward_hook(lambda *_: self.mark(OTHER))

    def watch_towers(self, clip: Any) -> None:
        """The two encoders of an open_clip model are phases."""
        clip.encode_image = self.around("image tower", clip.encode_image)
        clip.encode_text = self.around("text tower", clip.encode_text)

    def take(self) -> list[dict[str, float]]:
        """Milliseconds of each phase of each step since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        marks, self._marks = self._marks, []
        steps: list[dict[str, float]] = []
        for (phase, begin), (_, end) in pairwise(marks):
            if phase == FIRST:
                steps.append(dict.fromkeys((*PHASES, OTHER), 0.0))
            if phase != END:
                steps[-1][phase] += self._milliseconds(begin, end)
        return steps

    def _milliseconds(self, begin: Any, end: Any) -> float:
        if self.device.type == "cuda":
            return begin.elapsed_time(end)
        return 1e3 * (end - begin)


class Watched:
    """An iterator whose waits are the phase of data."""

    def __init__(self, batches: Iterator[Any], timeline: Timeline) -> None:
        self._batches = batches
        self._next = timeline.around(FIRST, batches.__next__)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def watch_job(job: Job, timeline: Timeline) -> None:
    """Mark the phases of the steps that the engine's loop takes with this job.

    Masks of a student are drawn in the phase of data, and learn in that of the update.
    """
    if (pruning := job.pruning) is not None:
        draw = pruning.begin

        def begin(step: int) -> None:
            timeline.mark(FIRST)
            draw(step)

        pruning.begin = begin  # type: ignore[method-assign]
        pruning.finish = timeline.around("update", pruning.finish)  # type: ignore[method-assign]
    job.loader = Watched(job.loader, timeline)
    if job.teachers is not None:
        job.teachers = timeline.around("teacher", job.teachers)  # type: ignore[assignment]
    root, engine = job.engine.module, job.engine
    timeline.watch_towers(root.student.clip)
    timeline.watch_module("loss", root.method)
    engine.backward = timeline.around("backward", engine.backward)
    engine.step = timeline.around("update", engine.step)
