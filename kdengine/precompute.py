# SPDX-License-Identifier: Apache-2.0
"""Run a recipe's teachers once over its data, for trainings that then need no teacher.

    kdengine cache OUT --recipe NAME [--section.key value]
    torchrun --nproc-per-node 8 -m kdengine.cli cache OUT --recipe NAME     all GPUs of a machine

Every image is embedded in a few random crops, every caption as it is, by each teacher. A command
that was interrupted is given again: crops and captions of a shard that are complete are kept. Train
with --distill.cache OUT. Of a run's options train.seed is that of the crops and train.precision
that of the teachers, where distill.distill-precision is 'auto'; a training's other options may be
given as well, and are not used.
"""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kdengine import LOCAL_DIR, arguments, errors
from kdengine.stop import ignore_signals

if TYPE_CHECKING:
    from kdengine.cache import Summary


def main(argv: Sequence[str]) -> int:
    """Fill a cache as the command line says; returns the exit code."""
    line = arguments.parse_line(arguments.CacheLine, argv, __doc__ or "", "kdengine cache")
    config = line.config
    if config.data.dataset_type == "synthetic":
        raise ValueError("cache: synthetic data has nothing to keep; give --data.train-data")
    if line.views < 1 or line.batch_size < 1:
        raise ValueError(
            f"cache: expected at least one view and a batch of at least 1; got {line.views} views "
            f"and a batch size of {line.batch_size}"
        )
    if not config.distill.teachers() or line.out.startswith(LOCAL_DIR):
        named = " ".join(model for model, _ in config.distill.teachers()) or "none"
        raise ValueError(
            f"cache: expected a folder OUT and teachers, got OUT {line.out} and teachers {named}; "
            "give OUT first, as in 'kdengine cache OUT --distill.distill-model MODEL...'"
        )
    if config.distill.cache is not None:
        raise ValueError(
            f"cache: expected teachers to run, got --distill.cache {config.distill.cache}, which "
            "is for training; leave it away"
        )
    from kdengine import assembly, job
    from kdengine.cache import build_cache, hash_file
    from kdengine.data.summary import refuse_empty
    from kdengine.models.source import resolve

    me = job.start_ranks(config)
    teachers = assembly.load_teachers(config, me)
    index = assembly.open_index(config, me, sorted({t.spec.tokenizer for t in teachers}))
    refuse_empty(index)
    # the files are at hand now that the teachers have been built
    files = [resolve("teacher", *named).checkpoint for named in config.distill.teachers()]
    hashes = me.broadcast([hash_file(file) for file in files if file] if me.first else None)
    summary = build_cache(
        index,
        teachers,
        hashes,
        line.out,
        views=line.views,
        storage=line.storage,
        seed=config.train.seed,
        ranks=me,
        batch_size=line.batch_size,
        num_threads=config.data.workers,
        progress=True,
    )
    if summary is not None:
        Console().print(table(line, summary))
    return 0


def table(line: arguments.CacheLine, summary: "Summary") -> Table:
    """What the cache holds now, for a person."""
    found = Table(title=f"cache {line.out}", show_header=False, title_justify="left")
    made = "all there before" if not summary.num_made else f"{summary.num_made:,} embedded now"
    found.add_row("views", f"{line.views} of {summary.num_samples:,} samples")
    found.add_row("captions", f"{summary.num_captions:,}; with the views {made}")
    each = summary.num_bytes / summary.num_samples
    found.add_row("size", f"{summary.num_bytes / 2**20:,.1f} MiB, {each:,.0f} bytes a sample")
    error = f"mean {summary.mean_error:.1e}, largest {summary.max_error:.1e} of a unit vector"
    found.add_row("storage", f"{line.storage}, error {error}")
    found.add_row("train with", f"--distill.cache {line.out}")
    return found


def command(argv: Sequence[str]) -> int:
    """``main`` for a shell: what the user can mend is told once for all ranks, exit code 2."""
    # a scheduler's signal ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main(argv)
    except KeyboardInterrupt:
        told = "interrupted; what is complete is kept, and the same command goes on from there"
        print(told, file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except Exception as error:
        if not errors.is_refusal(error):
            raise
        from kdengine import ranks

        ignore_signals()
        ranks.tell(error)
        return errors.EXIT_REFUSED
