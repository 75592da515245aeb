# SPDX-License-Identifier: Apache-2.0
"""What ``kdengine inherit`` does: cut a student out of a teacher, and write it as an export."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from kdengine import MAX_PIXELS
from kdengine.data import ViewSpec, build_loader, ensure_index
from kdengine.data.progress import Progress
from kdengine.evaluate.command import open_model
from kdengine.losses import similarity_loss
from kdengine.models import Student, build_from_spec, build_student, export_student
from kdengine.models.pruning.axes import layer_counts
from kdengine.models.pruning.inherit import Depth, Inheritance, inherit, student_spec, unit_scores
from kdengine.models.sizes import parameter_counts
from kdengine.ranks import on_gpu

REPORT = "inheritance.json"
Width = Literal["front", "magnitude", "taylor"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The images and captions that widths are chosen and batch norms measured on.

    Random crops, in random order, as in training; each sample at most once, and those that fill no
    batch not at all. The same seed gives the same batches.
    """

    shards: str
    num_samples: int = 2048
    batch_size: int = 64
    index_dir: str | None = None
    max_pixels: int = MAX_PIXELS
    num_threads: int = 4
    seed: int = 0

    def batches(self, model: Student, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b, 3, S, S] and tokens [b, context] as the model wants them, with a bar."""
        spec = model.spec
        index = ensure_index(
            self.shards,
            index_dir=self.index_dir,
            tokenizers=(spec.tokenizer,),
            max_pixels=self.max_pixels,
            progress=True,
        )
        total = min(self.num_samples, index.num_samples)
        size = min(self.batch_size, total)
        device_id = torch.cuda.current_device() if on_gpu() else None
        loader: Any = build_loader(
            index,
            views={"image": ViewSpec.like(spec.preprocess)},
            tokenizers={"tokens": spec.tokenizer},
            batch_size=size,
            num_threads=self.num_threads,
            seed=self.seed,
            device_id=device_id,
        )
        try:
            with Progress(sys.stderr.isatty()) as bars:
                count = total // size
                advance = bars.begin(title, "batches", count)
                for _ in range(count):
                    batch = next(loader)
                    yield batch["image"], batch["tokens"]
                    advance(1, 1)
        finally:
            loader.close()


def inherit_command(
    teacher: str,
    student: str,
    out: str | Path,
    *,
    depth: Depth = "front",
    width: Width = "front",
    calibration: Calibration | None = None,
    force: bool = False,
) -> Group:
    """Cut a student out of a teacher and write it as a folder that open_clip loads.

    The folder also holds ``inheritance.json``: every tensor's fate and the units kept.

    Args:
        teacher: see ``evaluate.open_model``.
        student: gives the architecture; weights it may have are not used.
        out: folder of the export.
        depth: see ``models.pruning.inherit.layer_map``.
        width: which units are kept: the first, those with the largest weights behind them
            (root of the sum of squares over the unit's gate), or those whose removal changes the
            teacher's InfoNCE the most, to first order: the mean over calibration batches of
            ``|sum w dL/dw|`` over the gate (Molchanov et al. 2019, eq. 8, before squaring).
        calibration: for ``taylor``, and for a student with batch norms, whose running statistics
            are then measured anew: a cut changes what flows into them.
        force: write beside other things in the folder.

    Returns:
        Tables of what was kept, for a person.

    Raises:
        ValueError: ``taylor`` without calibration, or see ``models.pruning.inherit.inherit``.
    """
    if width == "taylor" and calibration is None:
        raise ValueError(
            "inherit: --width taylor measures on data, and none came; give --calibration SHARDS"
        )
    source = open_model(teacher)
    shape = build_student(student, seed=0)
    spec = student_spec(shape.spec, source.spec)
    scores = magnitudes(source) if width == "magnitude" else None
    if width == "taylor" and calibration is not None:
        scores = taylor(source, calibration)
    found = inherit(source, Student(shape.tower, spec), depth=depth, scores=scores)
    tower = build_from_spec(spec)
    tower.clip.load_state_dict(found.tensors)
    cut = Student(tower, spec)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.modules())
    if normed and calibration is not None:
        recalibrate(cut, calibration)
    rule = {"teacher": source.spec.label, "depth": depth, "width": width}
    report = json.dumps(to_dict(found, rule), indent=1) + "\n"
    export_student(
        tower.state_dict(),
        spec,
        out,
        force=force,
        notes={"inherited": rule},
        files={REPORT: report},
    )
    notes = [f"wrote {out}: --model.model local-dir:{out}"]
    if calibration is not None and width != "taylor" and not normed:
        notes.append(f"calibration was not needed: width {width}, no batch norms")
    if normed and calibration is None:
        notes.append(
            "batch norms have the teacher's statistics, which are off after a cut: give "
            "--calibration SHARDS, or train before you evaluate"
        )
    return Group(*tables(source, cut, found), *notes)


def magnitudes(model: Student) -> dict[str, Tensor]:
    """The root of the sum of squares of the weights of each unit's gate."""
    weights = model.tower.clip.state_dict()
    squares = {name: p.detach() ** 2 for name, p in model.tower.clip.named_parameters()}
    return {
        group: total.sqrt() for group, total in unit_scores(weights, model.spec, squares).items()
    }


def taylor(model: Student, calibration: Calibration) -> dict[str, Tensor]:
    """The mean over batches of each unit's ``|sum w dL/dw|``, L the model's own InfoNCE."""
    device = "cuda" if on_gpu() else "cpu"
    tower = model.tower.to(device).eval().requires_grad_(True)
    found: dict[str, Tensor] = {}
    for image, tokens in calibration.batches(model, "calibrate widths"):
        tower.zero_grad()
        x, y, scale = tower(image, tokens)
        similarity_loss(x, y, scale, normalize=True).backward()
        values = {
            name: p.detach() * p.grad
            for name, p in tower.clip.named_parameters()
            if p.grad is not None
        }
        scores = unit_scores(tower.clip.state_dict(), model.spec, values)
        for group, total in scores.items():
            found[group] = found.get(group, torch.zeros_like(total)) + total.abs()
    tower.to("cpu").zero_grad()
    return {group: total.cpu() for group, total in found.items()}


def recalibrate(model: Student, calibration: Calibration) -> None:
    """Measure the running statistics of batch norms over the calibration images."""
    device = "cuda" if on_gpu() else "cpu"
    visual: Any = model.tower.to(device).clip.visual
    images = (image for image, _ in calibration.batches(model, "recalibrate batch norms"))
    update_bn(images, visual)
    model.tower.to("cpu")


def to_dict(found: Inheritance, rule: dict[str, str]) -> dict[str, Any]:
    """Plain values of the report: the rule, the units kept by group, every tensor's fate."""
    units = {group: kept.tolist() for group, kept in found.units.items()}
    return {**rule, "units": units, "tensors": [fate._asdict() for fate in found.fates]}


def tables(teacher: Student, student: Student, found: Inheritance) -> list[Table]:
    """Layers, units and parameters of both, for a person."""
    kept = Table(title="inherited", title_justify="left")
    for column in ("what", "teacher", "student", "kept"):
        kept.add_column(column, justify="left" if column in ("what", "kept") else "right")
    large = layer_counts(teacher.tower.clip.state_dict())
    for stage, layers in found.layers.items():
        listed = " ".join(map(str, layers))
        kept.add_row(f"layers of {stage}", str(large[stage]), str(len(layers)), listed)
    # layers of one shape share a row
    rows = {
        (re.sub(r"\.\d+\.(?=[a-z]+$)", ".*.", group), found.available[group], len(units))
        for group, units in found.units.items()
    }
    for what, total, count in sorted(rows):
        kept.add_row(what, str(total), str(count), "")
    counts = Table(title="parameters, millions", title_justify="left")
    for column in ("", "teacher", "student", "share"):
        counts.add_column(column, justify="right" if column else "left")
    both = [parameter_counts(model.tower.clip) for model in (teacher, student)]
    for what in both[0]:
        pair = [one[what] / 1e6 for one in both]
        share = f"{pair[1] / pair[0]:.1%}" if pair[0] else ""
        counts.add_row(what, *(f"{x:.2f}" for x in pair), share)
    fates = [fate.fate for fate in found.fates]
    counts.caption = ", ".join(f"{fates.count(x)} tensors {x}" for x in ("kept", "sliced", "left"))
    return [kept, counts]
