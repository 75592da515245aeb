# SPDX-License-Identifier: Apache-2.0
"""Commands that measure models, compare runs, and look at the machine."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kdengine import MAX_PIXELS
from kdengine.cli.shared import check_folder, export_latest, print_table
from kdengine.evaluate.layout import find_sets
from kdengine.evaluate.words import read_sets, run_settings


def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    *,
    retrieval: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    zeroshot: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    probe: Annotated[tuple[str, ...], arg(metavar="SET...", help_behavior_hint="")] = (),
    folder: Annotated[Path | None, arg(metavar="ROOT", help_behavior_hint="")] = None,
    batch_size: int = 128,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    max_pixels: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
    workers: int = 4,
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    json: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    teacher: Annotated[tuple[str, ...], arg(metavar="MODEL...", help_behavior_hint="")] = (),
) -> int:
    """Evaluate an exported folder, a run, or an open_clip model on sets of images.

    SHARDS are written as for 'kdengine index'.

    For classes, a folder with a folder of images for each may stand for the shards. They are named
    by class names, class numbers (from 0) or WordNet ids; classes without a folder do not compete.

    --folder takes all sets of CLIP_benchmark's local layout below ROOT: zero-shot on test/, and a
    linear probe where there is a train/. A set that fails costs none of the others; the exit code
    is then 1.

    Args:
        model: Exported folder, run folder (its latest checkpoint), or 'ARCHITECTURE@TAG'.
        retrieval: Sets of image-caption pairs, each 'NAME=SHARDS'.
        zeroshot: Classification sets, each 'NAME=SHARDS', 'NAME=SHARDS;CLASSNAMES;TEMPLATES' or
            'NAME=DATA;SPLIT.json[:val]'.
        probe: Sets for a linear probe of the image embeddings, each 'NAME=TRAIN;TEST'.
        folder: Folder of data sets, each with test/nshards.txt, test/0.tar, ..., classnames.txt and
            zeroshot_classification_templates.txt.
        batch_size: Images in a batch.
        index_dir: Folder for the index; by default a run's data.index_dir, or beside the shards.
        max_pixels: Largest image that is not quarantined; by default that of the run, or 89478485.
        workers: Decoding threads.
        out: Also write the numbers to this JSON file.
        json: With --folder: also write a JSON file for each set and task, as CLIP_benchmark does,
            into this folder.
        teacher: Models, as MODEL, to compare with over the retrieval sets: cosine and CKA.
    """
    # what can be wrong with the words is found before torch is loaded
    own = run_settings("eval", model)
    if folder is not None and (retrieval or zeroshot or probe or teacher):
        raise ValueError(
            "eval: --folder brings its own sets; give --retrieval, --zeroshot, --probe and "
            "--teacher in another call"
        )
    found = find_sets(folder) if folder else []
    sets = [] if folder else read_sets(retrieval, zeroshot, probe)
    if min(batch_size, workers) < 1:
        raise ValueError("eval: --batch-size and --workers must be at least 1")
    _check_places(out, json, folder)
    if teacher and not retrieval:
        raise ValueError("eval: --teacher compares on retrieval sets; give --retrieval NAME=SHARDS")
    are_runs = [own is not None, *(run_settings("eval", word) is not None for word in teacher)]
    from kdengine.evaluate import evaluate_command, evaluate_suite

    with tempfile.TemporaryDirectory() as temporary:
        exported = [
            export_latest(word, f"{temporary}/{number}") if is_run else word
            for number, (word, is_run) in enumerate(zip((model, *teacher), are_runs, strict=True))
        ]
        own = {"index_dir": None, "max_pixels": MAX_PIXELS} | (own or {})
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "index_dir": own["index_dir"] if index_dir is None else index_dir,
            "max_pixels": own["max_pixels"] if max_pixels is None else max_pixels,
            "num_threads": workers,
            "out": out,
            "title": model,
        }
        if folder is not None:
            table, failed = evaluate_suite(exported[0], found, json_dir=json, **options)
        else:
            others = dict(zip(teacher, exported[1:], strict=True))
            table, failed = evaluate_command(exported[0], sets, teachers=others, **options), False
    print_table(table)
    return 1 if failed else 0


def _check_places(out: Path | None, json: Path | None, folder: Path | None) -> None:
    """Refuse what results cannot be written to."""
    if out is not None and out.is_dir():
        raise IsADirectoryError(f"eval: --out {out} is a folder; expected the name of a file")
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"eval: --out {out}: the folder {out.parent} does not exist")
    if json is not None and folder is None:
        raise ValueError("eval: --json writes the results of --folder ROOT; for others give --out")
    if json is not None and json.exists() and not json.is_dir():
        raise NotADirectoryError(f"eval: --json {json} is a file; expected a folder")
    if json is not None and out is not None and out.resolve().parent == json.resolve():
        raise ValueError(
            f"eval: --out {out} lies in the folder of --json, all of which CLIP_benchmark reads; "
            "write it elsewhere"
        )


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
