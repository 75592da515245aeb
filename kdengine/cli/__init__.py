# SPDX-License-Identifier: Apache-2.0
"""The ``kdengine`` command; ``COMMANDS`` lists what it can do."""

import os
import sys
from collections.abc import Callable, Sequence

import tyro

from kdengine import errors, options
from kdengine.cli.data import index, pack
from kdengine.cli.embeddings import balance, cluster
from kdengine.cli.models import convert, export, inherit, onnx
from kdengine.cli.results import doctor, evaluate, report
from kdengine.cli.training import cache, demo, train

DESCRIPTION = "Distil large CLIP models into small ones."
COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "cache": cache,
    "index": index,
    "pack": pack,
    "cluster": cluster,
    "balance": balance,
    "inherit": inherit,
    "convert": convert,
    "eval": evaluate,
    "export": export,
    "onnx": onnx,
    "report": report,
    "demo": demo,
    "doctor": doctor,
}


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
        return errors.EXIT_INTERRUPTED
    except Exception as error:
        if not errors.is_refusal(error):
            raise
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from kdengine import ranks

            ranks.tell(error)
        else:
            print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_REFUSED
