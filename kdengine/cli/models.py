# SPDX-License-Identifier: Apache-2.0
"""Commands that make a model out of another."""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from kdengine.cli.shared import check_folder, export_latest, print_table
from kdengine.evaluate.words import refuse_folder_of_runs, run_settings


def inherit(
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    teacher: Annotated[str, arg(metavar="MODEL", help_behavior_hint="(required)")],
    student: Annotated[str, arg(metavar="CONFIG", help_behavior_hint="(required)")],
    depth: Literal["front", "even"] = "front",
    width: Literal["front", "magnitude", "taylor"] = "front",
    calibration: Annotated[str | None, arg(metavar="SHARDS", help_behavior_hint="")] = None,
    num_samples: int = 2048,
    batch_size: int = 64,
    seed: int = 0,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    workers: int = 4,
    force: FlagCreatePairsOff[bool] = False,
) -> int:
    """Cut a smaller student out of a teacher's weights, to train from (TinyCLIP).

    Both have a ViT or a ModifiedResNet of open_clip as image tower, and its text transformer.

    Args:
        out: Folder to write, for --model.model local-dir:OUT.
        teacher: Exported folder, or 'ARCHITECTURE@TAG' of open_clip.
        student: Architecture of kdengine or open_clip, or a JSON file; heads as wide as the
            teacher's, equal embedding width, patches and vocabulary.
        depth: 'front' takes layer i * floor(n / k), the released rule; 'even' spreads over all n.
        width: Which heads, channels and neurons stay: the first, those with the largest weights, or
            those that change the teacher's loss on the calibration data the most.
        calibration: Image-caption shards, for 'taylor' and for the statistics of batch norms.
        num_samples: How many of their samples are looked at.
        batch_size: Pairs in a batch.
        seed: Of the order and the crops of the calibration data.
        index_dir: Folder for their index; by default beside the shards.
        workers: Decoding threads.
        force: Replace another export, or write beside other files; those stay.
    """
    if min(num_samples, batch_size, workers) < 1:
        raise ValueError("inherit: --num-samples, --batch-size and --workers must be at least 1")
    from kdengine.inherit import Calibration, inherit_command

    data = None
    if calibration is not None:
        data = Calibration(
            shards=calibration,
            num_samples=num_samples,
            batch_size=batch_size,
            index_dir=index_dir,
            num_threads=workers,
            seed=seed,
        )
    print_table(
        inherit_command(
            teacher, student, out, depth=depth, width=width, calibration=data, force=force
        )
    )
    return 0


def convert(
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    model: Annotated[str, arg(metavar="CONFIG", help_behavior_hint="(required)")],
    force: FlagCreatePairsOff[bool] = False,
) -> int:
    """Write a checkpoint that TinyCLIP published as a folder for 'local-dir:OUT'.

    Models that were pruned automatically have layers of unequal sizes; kdengine loads them,
    open_clip cannot.

    Args:
        checkpoint: The .pt file.
        out: Folder to write.
        model: Configuration: TinyCLIP-ViT-39M-16-Text-19M and others, of a pruned model the whole
            one, ViT-B-32.
        force: Replace another export, or write beside other files; those stay.
    """
    from kdengine.models import export_student
    from kdengine.models.pruning.released import released_student

    tower, spec = released_student(checkpoint, model)
    export_student(tower.state_dict(), spec, out, force=force, notes={"converted": checkpoint.name})
    _tell_export(out)
    return 0


def export(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    step: str = "latest",
    force: FlagCreatePairsOff[bool] = False,
) -> int:
    """Write a run's student as a folder that open_clip loads with 'local-dir:OUT'.

    Args:
        run: Folder of the run.
        out: Folder to write.
        step: Which checkpoint: 'latest' or its step.
        force: Replace the export of another run, or write beside other files; those stay.
    """
    check_folder("export", run)
    refuse_folder_of_runs("export", run)
    from kdengine.checkpoint import export_run
    from kdengine.models.export import refuse_other_run

    if not force:
        refuse_other_run(out, run)
    export_run(run, out, step=step, force=force)
    _tell_export(out)
    return 0


def onnx(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    force: FlagCreatePairsOff[bool] = False,
) -> int:
    """Write the towers of a model as ONNX graphs, visual.onnx and textual.onnx.

    Both take any batch size and give features of unit length; how images and captions are made
    ready for them, and the scale of the logits, is in their metadata. They are compared with torch
    before they are written.

    Args:
        model: Exported folder, run folder (its latest checkpoint), or 'ARCHITECTURE@TAG'.
        out: Folder to write.
        force: Write beside other files; those stay.
    """
    is_run = run_settings("onnx", model) is not None
    from kdengine.evaluate.command import open_model
    from kdengine.models.onnx import OPSET, export_onnx, require_packages
    from kdengine.models.sizes import size_in_words

    # before a model is fetched
    require_packages()
    with tempfile.TemporaryDirectory() as folder:
        student = open_model(export_latest(model, f"{folder}/model") if is_run else model)
        graphs = export_onnx(student, out, force=force)
    print(f"wrote {out}, opset {OPSET}: {size_in_words(student.tower.clip)}")
    for graph in graphs:
        megabytes = graph.num_bytes / 1e6
        print(f"{graph.file}: {megabytes:.1f} MB, within {graph.error:.0e} of torch's features")
    return 0


def _tell_export(out: Path) -> None:
    """Load an export, and say how large it is and what else can load it."""
    from kdengine import load_model
    from kdengine.models.sizes import size_in_words

    student = load_model(out)
    print(f"wrote {out}: {size_in_words(student.tower.clip)}")
    if ragged := student.spec.model_cfg.get("ragged"):
        print(
            f"layers of unequal sizes ({' and '.join(ragged)}): load it with "
            f"kdengine.load_model('{out}'), open_clip cannot"
        )
    else:
        print(f"load it with open_clip.create_model_and_transforms('local-dir:{out}')")
