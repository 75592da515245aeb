# SPDX-License-Identifier: Apache-2.0
"""Read what runs left on disk; what is missing becomes a note, never an error."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdengine import LOCAL_DIR
from kdengine.log import EVALUATIONS, METRICS, read

CONFIG = "config.toml"
FILES = (CONFIG, METRICS, EVALUATIONS)
# buffers of batch norms and masks in an exported state dict are no parameters
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "attn_mask")


@dataclass(eq=False)
class Record:
    """One run: its configuration, its logged steps, its evaluations."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def results(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {name: value for name, value in last.items() if name != "step" and finite(value)}

    @property
    def export(self) -> Path:
        """The folder of the exported student."""
        return self.folder / "export"

    def get(self, section: str, name: str) -> Any:
        """A value of the configuration, or None."""
        table = self.config.get(section)
        return table.get(name) if isinstance(table, dict) else None

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged quantity, without those that are missing."""
        return points(self.steps, name)

    def last(self, name: str) -> float | None:
        """The last value of a logged quantity."""
        values = self.series(name)[1]
        return values[-1] if values else None

    @property
    def distilled(self) -> bool:
        """Whether the run learned from a teacher."""
        taught = self.get("distill", "distill_model") or self.get("distill", "cache")
        return bool(taught) and self.get("method", "name") != "clip"

    @property
    def exports(self) -> list[Path]:
        """The exported models that taught the run."""
        named = self.get("distill", "distill_model") if self.distilled else []
        names = named if isinstance(named, list) else [named]
        folders = (str(n).removeprefix(LOCAL_DIR) for n in names if str(n).startswith(LOCAL_DIR))
        return [Path(folder).resolve() for folder in folders]


def points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of ``name`` in a list of records."""
    pairs = [(r["step"], r[name]) for r in records if finite(r.get(name)) and finite(r.get("step"))]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def finite(value: Any) -> bool:
    """Whether ``value`` is a number that can be drawn."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def read_run(folder: Path) -> Record:
    """Read a run's folder; ``notes`` says what could not be read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing in it is what training writes.
    """
    expected = "the folder of a run, as training writes it (LOGS/NAME with " + ", ".join(FILES)
    if not folder.is_dir():
        raise FileNotFoundError(f"report: expected {expected}); {folder} is no folder")
    if not any((folder / name).is_file() for name in FILES):
        inside = sorted(path.name for path in folder.iterdir())
        runs = [n for n in inside if any((folder / n / file).is_file() for file in FILES)]
        what = f"holds only {', '.join(inside[:5])}" if inside else "is empty"
        what += " ..." if len(inside) > 5 else ""
        hint = "; did you mean " + ", ".join(str(folder / n) for n in runs[:5]) if runs else ""
        raise ValueError(f"report: expected {expected}); {folder} {what}{hint}")
    run = Record(folder, folder.resolve().name)
    try:
        run.config = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.notes.append(f"no {CONFIG}: its settings are unknown")
    except (OSError, ValueError) as error:
        run.notes.append(f"{CONFIG} cannot be read: {error}")
    run.steps = _records(folder / METRICS, "no curves and no cost", run.notes)
    run.evaluations = _records(folder / EVALUATIONS, "no evaluation results", run.notes)
    lost = sum("loss" in r and not finite(r["loss"]) for r in run.steps)
    if lost:
        run.notes.append(f"{lost} of {len(run.steps)} logged losses are not finite")
    return run


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """Read several runs; equal names become their shortest different ends of paths.

    Raises:
        ValueError: there is none, one is given twice, or one is no run.
        FileNotFoundError: see ``read_run``.
    """
    if not folders:
        raise ValueError("report: expected the folder of at least one run, got none")
    resolved = [Path(folder).resolve() for folder in folders]
    if twice := [str(f) for f in resolved if resolved.count(f) > 1]:
        raise ValueError(f"report: expected different runs; {twice[0]} is given twice")
    runs = [read_run(Path(folder)) for folder in folders]
    for depth in range(2, 8):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = "/".join(run.folder.resolve().parts[-depth:])
    return runs


def _records(path: Path, loss: str, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append(f"no {path.name}: {loss}")
        return []
    try:
        found = read(path)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}): {loss}")
        return []
    records = [r for r in found if isinstance(r, dict) and finite(r.get("step"))]
    if not records:
        notes.append(f"{path.name} holds no record: {loss}")
    return records


def teachers_of(run: Record, runs: Sequence[Record]) -> list[Record]:
    """The runs among ``runs`` whose exported students teach ``run``."""
    return [other for other in runs if other.export.resolve() in run.exports]


def teachers(runs: Sequence[Record]) -> list[Record]:
    """The runs that teach others; where all do, none counts as a teacher only."""
    found = [teacher for run in runs for teacher in teachers_of(run, runs)]
    chosen = [run for run in runs if any(run is teacher for teacher in found)]
    return chosen if len(chosen) < len(runs) else []


def baseline_of(run: Record, runs: Sequence[Record]) -> Record | None:
    """The run without teacher that equals the distilled ``run`` in student, data and budget.

    One of the same seed comes first.
    """
    if not run.distilled:
        return None
    alike = [r for r in runs if r.config and not r.distilled and _budget(r) == _budget(run)]
    alike.sort(key=lambda other: other.get("train", "seed") != run.get("train", "seed"))
    return alike[0] if alike else None


def _budget(run: Record) -> tuple[Any, ...]:
    keys = [("model", "model"), ("model", "pretrained"), ("data", "train_data")]
    keys += [("train", name) for name in ("batch_size", "steps", "epochs")]
    # samples seen tell runs apart that used other numbers of ranks, or ended early
    return (*(run.get(*key) for key in keys), micro_batches(run), run.last("samples_seen"))


def micro_batches(run: Record) -> Any:
    """Forward passes of a step; one in runs that are older than the setting."""
    return run.get("train", "accum_freq") or 1


def num_ranks(run: Record) -> int | None:
    """Processes that trained: samples seen in a step over the batch of one process."""
    seen, batch = run.last("samples_seen"), run.get("train", "batch_size")
    step, parts = run.steps[-1]["step"] if run.steps else 0, micro_batches(run)
    if seen is None or not (finite(batch) and finite(parts)) or not batch or not step:
        return None
    return max(1, round(seen / (step * batch * parts)))


def num_parameters(run: Record) -> int | None:
    """Parameters of the exported student, from the header of its weights; None without export."""
    try:
        with (run.export / "open_clip_model.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and not name.endswith(BUFFERS)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return None


def image_size(run: Record) -> int | None:
    """Side of the exported student's images in pixels; None without export."""
    try:
        text = (run.export / "open_clip_config.json").read_text(encoding="utf-8")
        size = json.loads(text)["model_cfg"]["vision_cfg"]["image_size"]
        return int(size[0] if isinstance(size, list) else size)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
