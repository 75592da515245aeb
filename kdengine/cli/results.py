# SPDX-License-Identifier: Apache-2.0
"""Commands that measure models, compare runs, and look at the machine."""

import tempfile
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from kdengine import MAX_PIXELS
from kdengine.cli.shared import check_folder, export_latest, print_table
from kdengine.evaluate.words import read_sets, run_settings


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
        zeroshot: Classification sets, each 'NAME=SHARDS', 'NAME=SHARDS;CLASSNAMES;TEMPLATES' or
            'NAME=DATA;SPLIT.json[:val]'.
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
            export_latest(word, f"{folder}/{number}") if is_run else word
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
    print_table(table)
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
        check_folder("report", run)
    from kdengine.report import write_report

    write_report(list(runs), out)
    print(f"wrote {out}")
    return 0


def doctor() -> int:
    """Print what this machine can run: versions, devices, each kernel's backends, and why not."""
    from kdengine.doctor import diagnosis

    print_table(diagnosis())
    return 0
