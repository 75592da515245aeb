# SPDX-License-Identifier: Apache-2.0
"""The ``kdengine`` command: index, pack, train, eval, export, report, demo."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

DESCRIPTION = "Distil large CLIP models into small ones."


def index(
    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS")],
    /,
    *,
    index_dir: str | None = None,
    tokenizers: tuple[str, ...] = ("simple:77",),
    max_pixels: int = 89_478_485,
    require: Literal["caption", "label"] = "caption",
    workers: int | None = None,
) -> int:
    """Validate every sample of the shards once and write the index that training reads.

    Args:
        shards: Files, or braces ('/data/{00000..00331}.tar'); several may be joined by '::'.
        index_dir: Folder for the index, where the shards' own folder cannot be written.
        tokenizers: Tokenizers whose token ids are stored, as 'simple:CONTEXT' or 'hf:NAME:CONTEXT'.
        max_pixels: An image whose header states more pixels is quarantined before any decode.
        require: What a sample needs beside its image: a caption, or the label of a class.
        workers: Processes; all cores by default.
    """
    from kdengine.data import ensure_index, summary_table

    if not shards:
        raise ValueError("kdengine index: expected shards, got none; name at least one .tar file")
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
    return 0 if found.num_samples else 1


def pack(
    csv: Annotated[Positional[Path], arg(metavar="CSV")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    shard_size: int = 10_000,
) -> int:
    """Make img2dataset-style shards from a table of image paths and captions.

    Args:
        csv: Table with a header; image paths are relative to its folder.
        out: Folder for the shards.
        image_key: Column of the image paths.
        caption_key: Column of the captions.
        separator: Column separator; found out from the header by default.
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
    retrieval: tuple[str, ...] = (),
    zeroshot: tuple[str, ...] = (),
    batch_size: int = 128,
    index_dir: str | None = None,
    max_pixels: int = 89_478_485,
    workers: int = 4,
    out: Path | None = None,
) -> int:
    """Evaluate an exported folder, a run, or an open_clip model on sets of shards.

    Args:
        model: Exported folder, run folder (its latest checkpoint), or 'ARCHITECTURE@TAG'.
        retrieval: Sets of image-caption pairs, each 'NAME=SHARDS'.
        zeroshot: Classification sets, each 'NAME=SHARDS' or 'NAME=SHARDS;CLASSNAMES;TEMPLATES'.
        batch_size: Images in a batch.
        index_dir: Folder for the index, where the shards' own folder cannot be written.
        max_pixels: An image whose header states more pixels is quarantined before any decode.
        workers: Decoding threads.
        out: Also write the numbers to this JSON file.
    """
    from kdengine.checkpoint import export_run
    from kdengine.evaluate import evaluate_command

    with tempfile.TemporaryDirectory() as folder:
        exported = model
        if (Path(model) / "checkpoints").is_dir():
            exported = f"{folder}/export"
            export_run(Path(model), Path(exported))
        table = evaluate_command(
            exported,
            retrieval=retrieval,
            zeroshot=zeroshot,
            batch_size=batch_size,
            index_dir=index_dir,
            max_pixels=max_pixels,
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
    force: bool = False,
) -> int:
    """Write a run's student as a folder that open_clip loads with 'local-dir:OUT'.

    Args:
        run: Folder of the run.
        out: Folder to write.
        step: Which checkpoint: 'latest' or its step.
        force: Replace what is in the folder.
    """
    from kdengine.checkpoint import export_run

    export_run(run, out, step=step, force=force)
    print(f"wrote {out}; load it with open_clip.create_model_and_transforms('local-dir:{out}')")
    return 0


def report(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
) -> int:
    """Write one self-contained page that compares runs: table, curves, cost, samples.

    Args:
        runs: Folders of runs.
        out: The page.
    """
    from kdengine.report import write_report

    if not runs:
        raise ValueError("kdengine report: expected folders of runs, got none")
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


def train(words: Positional[tuple[str, ...]], /) -> int:
    """Train a student in one process; for several ranks use 'deepspeed kdengine/train.py'.

    Args:
        words: What kdengine/train.py takes; 'kdengine train --help' lists it.
    """
    from kdengine.train import main as run_training

    return run_training(list(words)) or 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "index": index,
    "pack": pack,
    "eval": evaluate,
    "export": export,
    "report": report,
    "demo": demo,
}


def _print(table: object) -> None:
    from rich.console import Console

    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that name their mend are printed without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["train"]:  # its options are those of a run, parsed over there
            return train(tuple(words[1:]))
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="kdengine", description=DESCRIPTION, args=words
        )
    except (ValueError, RuntimeError, OSError) as error:
        # a rank's notes say where it stood
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
