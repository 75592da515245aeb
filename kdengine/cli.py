# SPDX-License-Identifier: Apache-2.0
"""The ``kdengine`` command; ``COMMANDS`` lists what it can do."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from kdengine import MAX_PIXELS, errors, options
from kdengine.evaluate.words import read_sets, refuse_folder_of_runs, run_settings

DESCRIPTION = "Distil large CLIP models into small ones."


def index(
    shards: Annotated[
        Positional[tuple[str, ...]], arg(metavar="SHARDS", help_behavior_hint="(required)")
    ],
    /,
    *,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    tokenizers: tuple[str, ...] = ("simple:77",),
    max_pixels: int = MAX_PIXELS,
    require: Literal["caption", "label"] = "caption",
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
) -> int:
    """Check every sample of the shards once and write the index that training reads.

    With --require label, a folder with a folder of images for each class may stand for the shards.

    Args:
        shards: Files, braces ('/data/{00000..00331}.tar'), or a folder: all .tar files directly in
            it; several may be joined by '::'.
        index_dir: Folder for the index; by default beside the shards.
        tokenizers: Tokenizers whose token ids are stored, as 'simple:CONTEXT' or 'hf:NAME:CONTEXT'.
        max_pixels: An image whose header states more pixels is quarantined before any decode.
        require: What a sample needs beside its image: a caption, or the label of a class.
        workers: Processes; all cores by default.
    """
    if not shards:
        raise ValueError("index: expected shards, got none; name at least one .tar file")
    from kdengine.data import ensure_index, summary_table
    from kdengine.data.summary import no_good_sample

    found = ensure_index(
        "::".join(shards),
        index_dir=index_dir,
        tokenizers=tokenizers,
        max_pixels=max_pixels,
        require=require,
        num_workers=workers,
        progress=True,
    )
    _print(summary_table(found))
    for path in found.quarantine_paths if found.num_quarantined else ():
        print(path)
    if not found.num_samples:
        print(f"error: index: {no_good_sample(found)}", file=sys.stderr)
    return 0 if found.num_samples else 1


def pack(
    csv: Annotated[Positional[Path], arg(metavar="CSV")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: Annotated[str | None, arg(metavar="CHARACTER", help_behavior_hint="")] = None,
    shard_size: int = 10_000,
) -> int:
    """Make img2dataset-style shards from a table of image paths and captions.

    Args:
        csv: Text table (comma or tab) with a header; image paths are relative to its folder.
        out: Folder for the shards.
        image_key: Column of the image paths.
        caption_key: Column of the captions.
        separator: Between columns; by default a tab where the header has one, else a comma.
        shard_size: Samples in a shard.
    """
    from kdengine.data import pack as pack_csv

    report = pack_csv(
        csv,
        out,
        image_key=image_key,
        caption_key=caption_key,
        separator=separator,
        shard_size=shard_size,
        progress=True,
    )
    print(report)
    return 0 if report.num_samples else 1


def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    *,
    retrieval: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    zeroshot: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    probe: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    batch_size: int = 128,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    max_pixels: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
    workers: int = 4,
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    teacher: Annotated[tuple[str, ...], arg(metavar="MODEL...", help_behavior_hint="")] = (),
) -> int:
    """Evaluate an exported folder, a run, or an open_clip model on sets of images.

    SHARDS are written as for 'kdengine index'.

    For classes, a folder with a folder of images for each may stand for the shards. They are named
    by class names, class numbers (from 0) or WordNet ids; classes without a folder do not compete.

    Args:
        model: Exported folder, run folder (its latest checkpoint), or 'ARCHITECTURE@TAG'.
        retrieval: Sets of image-caption pairs, each 'NAME=SHARDS'.
        zeroshot: Classification sets, each 'NAME=SHARDS' or 'NAME=SHARDS;CLASSNAMES;TEMPLATES'.
        probe: Sets for a linear probe of the image embeddings, each 'NAME=TRAIN;TEST'.
        batch_size: Images in a batch.
        index_dir: Folder for the index; by default a run's data.index_dir, or beside the shards.
        max_pixels: Largest image that is not quarantined; by default that of the run, or 89478485.
        workers: Decoding threads.
        out: Also write the numbers to this JSON file.
        teacher: Models, as MODEL, to compare with over the retrieval sets: cosine and CKA.
    """
    # what can be wrong with the words is found before torch is loaded
    own = run_settings("eval", model)
    sets = read_sets(retrieval, zeroshot, probe)
    if min(batch_size, workers) < 1:
        raise ValueError("eval: --batch-size and --workers must be at least 1")
    if out is not None and out.is_dir():
        raise IsADirectoryError(f"eval: --out {out} is a folder; expected the name of a file")
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"eval: --out {out}: the folder {out.parent} does not exist")
    if teacher and not retrieval:
        raise ValueError("eval: --teacher compares on retrieval sets; give --retrieval NAME=SHARDS")
    are_runs = [own is not None, *(run_settings("eval", word) is not None for word in teacher)]
    from kdengine.evaluate import evaluate_command

    with tempfile.TemporaryDirectory() as folder:
        exported = [
            _export_latest(word, f"{folder}/{number}") if is_run else word
            for number, (word, is_run) in enumerate(zip((model, *teacher), are_runs, strict=True))
        ]
        own = {"index_dir": None, "max_pixels": MAX_PIXELS} | (own or {})
        table = evaluate_command(
            exported[0],
            sets,
            teachers=dict(zip(teacher, exported[1:], strict=True)),
            batch_size=batch_size,
            index_dir=own["index_dir"] if index_dir is None else index_dir,
            max_pixels=own["max_pixels"] if max_pixels is None else max_pixels,
            num_threads=workers,
            out=out,
            title=model,
        )
    _print(table)
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
    _check_folder("export", run)
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
        student = open_model(_export_latest(model, f"{folder}/model") if is_run else model)
        graphs = export_onnx(student, out, force=force)
    print(f"wrote {out}, opset {OPSET}: {size_in_words(student.tower.clip)}")
    for graph in graphs:
        megabytes = graph.num_bytes / 1e6
        print(f"{graph.file}: {megabytes:.1f} MB, within {graph.error:.0e} of torch's features")
    return 0


def report(
    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN...", help_behavior_hint="(required)")
    ],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
) -> int:
    """Write one self-contained page that compares runs: table, curves, cost, samples.

    Args:
        runs: Folders of runs.
        out: The page.
    """
    if not runs:
        raise ValueError("report: expected folders of runs, got none")
    for run in runs:
        _check_folder("report", run)
    from kdengine.report import write_report

    write_report(list(runs), out)
    print(f"wrote {out}")
    return 0


def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> int:
    """Render data, train a teacher, train a student with and without it, compare them.

    Args:
        out: Folder for everything the demo writes.
        seed: Seed of the data and of all trainings.
    """
    from kdengine.demo import main as run_demo

    return run_demo(out=out, seed=seed)


def doctor() -> int:
    """Print what this machine can run: versions, devices, each kernel's backends, and why not."""
    from kdengine.doctor import diagnosis

    _print(diagnosis())
    return 0


def train(words: Positional[tuple[str, ...]], /) -> int:
    """Train a student in one process; for several ranks use 'deepspeed kdengine/train.py'.

    Args:
        words: What kdengine/train.py takes; 'kdengine train --help' lists it.
    """
    from kdengine.train import command

    return command(list(words))


def cache(words: Positional[tuple[str, ...]], /) -> int:
    """Run teachers once over the data of a recipe, for trainings that then load no teacher.

    Args:
        words: Folder of the cache, --recipe and options; 'kdengine cache --help' lists them.
    """
    from kdengine.precompute import command

    return command(list(words))


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
    _print(
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
    from kdengine.models.released import released_student

    tower, spec = released_student(checkpoint, model)
    export_student(tower.state_dict(), spec, out, force=force, notes={"converted": checkpoint.name})
    _tell_export(out)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "cache": cache,
    "index": index,
    "pack": pack,
    "inherit": inherit,
    "convert": convert,
    "eval": evaluate,
    "export": export,
    "onnx": onnx,
    "report": report,
    "demo": demo,
    "doctor": doctor,
}


def _check_folder(command: str, folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{command}: {folder} {what}; expected the folder of a run")


def _export_latest(run: str, out: str) -> str:
    from kdengine.checkpoint import export_run

    export_run(Path(run), Path(out))
    return out


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


def _print(table: object) -> None:
    from rich.console import Console

    # tables fit; a path is not cut
    Console().print(table, crop=False)


def _check_words(words: Sequence[str]) -> None:
    """Say in a line what is wrong with the words, where tyro would fill the screen."""
    if options.HELP.intersection(words):
        return
    if not words or words[0] not in COMMANDS:
        came = repr(words[0]) if words else "nothing"
        raise ValueError(f"kdengine: expected one of {', '.join(COMMANDS)}; got {came}; see --help")
    options.check_call(COMMANDS[words[0]], words[1:], words[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is one line and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # their options are those of a run, parsed over there
        if words[:1] == ["train"]:
            return train(tuple(words[1:]))
        if words[:1] == ["cache"]:
            return cache(tuple(words[1:]))
        options.refuse_empty(words)
        _check_words(words)
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="kdengine", description=DESCRIPTION, args=words
        )
    except BrokenPipeError:
        errors.forget_reader()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not errors.is_refusal(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
