# SPDX-License-Identifier: Apache-2.0
"""The modes of ``bench_step.py`` as configurations, the engine's steps, and the models."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import trainings
from benchmarks.common import Refusal
from benchmarks.timeline import END, Timeline, watch_job
from kdengine import job, loop
from kdengine.config import RunConfig, from_dict, to_toml
from kdengine.models import build_student, export_student
from kdengine.ranks import Heartbeat, Ranks
from kdengine.stop import Stop

# the mode that others are compared with; one whose loss open_clip has too; the paper's mix
PLAIN, RELATIONAL, WHOLE, CACHED = "no teacher", "InfoNCE + CRD", "CLIP-KD", "CLIP-KD, cached"
# the student of the first, whose towers learn TinyCLIP's masks
MASKED = "no teacher, masked"
MODES = (PLAIN, MASKED, RELATIONAL, WHOLE, CACHED)
Values = dict[str, Any]


class Runner(Protocol):
    """Something that takes steps and marks their phases."""

    def run(self, num_steps: int) -> None:
        """Take so many steps."""

    def close(self) -> None:
        """Free what decodes."""


def modes(teacher: Path) -> dict[str, Values]:
    """What the engine's configurations differ in; ``cached`` adds a cache to one."""
    distill = {"distill_model": f"local-dir:{teacher}"}
    relational = {"name": "clip_kd", "clip_kd": {"fd": 0.0, "icl": 0.0}}
    whole = {"method": {"name": "clip_kd"}, "distill": distill}
    return {
        PLAIN: {"method": {"name": "clip"}},
        # longer than any benchmark
        MASKED: {"method": {"name": "clip"}, "prune": {"target": 0.5, "steps": 900_000}},
        RELATIONAL: {"method": relational, "distill": distill},
        WHOLE: whole,
        CACHED: whole,
    }


def cached(values: Values, scratch: Path) -> Values:
    """The configuration with a cache in place of the teacher, made by ``kdengine cache``.

    Raises:
        RuntimeError: the command failed.
    """
    own = {name: table for name, table in values.items() if name not in ("run", "train")}
    recipe = to_toml(from_dict(RunConfig, own, "cache"))
    # other models or data are another cache; the same one is gone on with
    folder = scratch / "step" / f"cache-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    path.write_text(recipe, encoding="utf-8")
    words = ["-m", "kdengine.cli", "cache", str(folder), "--recipe", str(path), "--views", "1"]
    if reason := trainings.run_here(words, folder.with_suffix(".log"), scratch):
        raise RuntimeError(f"no cache: {reason}")
    return merged(values, {"distill": {"cache": str(folder)}})


class Engine:
    """The engine's own path from a configuration to steps."""

    def __init__(self, config: RunConfig, me: Ranks, timeline: Timeline) -> None:
        self._cleanup, self._timeline = contextlib.ExitStack(), timeline
        heartbeat = Heartbeat(me)
        self._job = job.build(config, me, Stop(), heartbeat, self._cleanup)
        watch_job(self._job, timeline)

    def run(self, num_steps: int) -> None:
        """Take steps of the training loop."""
        for _ in range(num_steps):
            loop.run_step(self._job, save=False)
            self._job.state.step += 1
        self._timeline.mark(END)

    def close(self) -> None:
        """Free what decodes."""
        self._cleanup.close()


class Model:
    """A model with random weights, exported so that both loops load it as they load any other."""

    def __init__(self, name: str, folder: Path) -> None:
        tower, spec = build_student(name, seed=0)
        self.name, self.spec = name, spec
        self.folder = export_student(tower.state_dict(), spec, folder)
        self.parameters = sum(x.numel() for x in tower.parameters())
        self.flops = forward_flops(tower, spec)


def forward_flops(tower: Any, spec: Any) -> float:
    """FLOPs of the products of both towers for one pair, counted by torch."""
    side = spec.preprocess.size
    image, tokens = torch.zeros(1, 3, side, side), torch.zeros(1, spec.context_length).long()
    # the fused attention of CPUs is not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tower.eval()(image, tokens)
    return float(counter.get_total_flops())


def widened(name: str, folder: Path) -> str:
    """A configuration with twice the widths and heads of a student: about four times its FLOPs.

    Raises:
        Refusal: a tower has no width to double.
    """
    config: Values = json.loads(json.dumps(dict(build_student(name, seed=0).spec.model_cfg)))
    for tower in ("vision_cfg", "text_cfg"):
        if "width" not in config[tower]:
            raise Refusal(
                f"--teacher 4x: expected a student whose {tower} has a width to double; {name} has "
                "none; name a teacher"
            )
        config[tower]["width"] *= 2
    config["text_cfg"]["heads"] *= 2
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(name).stem}-4x.json"
    path.write_text(json.dumps(config))
    return str(path)


def merged(base: Values, over: Values) -> Values:
    """Nested tables, the second over the first."""
    both = {k: merged(base[k], v) for k, v in over.items() if isinstance(base.get(k), dict)}
    return {**base, **over, **both}
