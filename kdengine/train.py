# SPDX-License-Identifier: Apache-2.0
"""Train a student, with or without a teacher.

    deepspeed kdengine/train.py --recipe NAME [--section.key value]
    python kdengine/train.py --recipe NAME [--section.key value]     one process

Everything is written under LOGS/NAME: config.toml, metrics.jsonl, eval.jsonl, out.log,
tensorboard/, checkpoints/, and at the end export/, the student as open_clip loads it. The exit code
is 0 when done, 2 when the run cannot be as asked for (one line says why), and 75 when it was asked
to stop (SIGTERM, SIGINT, SIGUSR1, or the end of its launcher) and has saved a checkpoint, if it had
begun: the same command with --resume latest goes on from there.
"""

import os
import sys

if __name__ == "__main__":
    # started by path, python looks into this file's folder first, where data/ and others would
    # shadow packages of the same name; what must be found is the repository and the kernels
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(here)
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    sys.path[:0] = [root, os.path.join(root, "kernels")]

import contextlib
from collections.abc import Sequence

# torch and what stands on it take seconds to import; signals and mistyped options do not wait
from kdengine import arguments, errors
from kdengine.config import RunConfig
from kdengine.stages import stage_lines
from kdengine.stop import Stop, ignore_signals, leave_on_signal


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says, of a recipe with stages all; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    for line in stage_lines(words):
        if code := train(arguments.parse(line, description=__doc__ or "")):
            return code
    return 0


def train(config: RunConfig) -> int:
    """One training; returns the exit code."""
    from kdengine import job, loop
    from kdengine.ranks import Heartbeat

    with Stop() as stop, contextlib.ExitStack() as cleanup:
        me = job.start_ranks(config)
        heartbeat = Heartbeat(me)
        cleanup.callback(heartbeat.close)
        try:
            built = job.build(config, me, stop, heartbeat, cleanup)
            stop.ready()
            return loop.train(built)
        except Exception as error:
            error.add_note(f"on rank {me.rank} of {me.world_size}; {heartbeat.report()}")
            raise


def command(argv: Sequence[str] | None = None) -> int:
    """``main`` for a shell: what the user can mend is one line and exit code 2."""
    leave_on_signal()
    try:
        return main(argv)
    except BrokenPipeError:
        errors.forget_reader()
        return 0
    except Exception as error:
        if not errors.is_refusal(error):
            raise
        from kdengine import ranks

        ignore_signals()
        ranks.tell(error)
        return errors.EXIT_REFUSED


if __name__ == "__main__":
    code = command()
    if "torch" in sys.modules and code != errors.EXIT_REFUSED:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
    sys.exit(code)
