# SPDX-License-Identifier: Apache-2.0
"""Tells what the user can mend from what is broken."""

import dis
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
EXIT_REFUSED = 2
"""Exit code of a command that cannot do what was asked for, and says why in one line."""

EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""


def forget_reader() -> None:
    """After a BrokenPipeError, as from ``--help | head``: nothing more can be printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_refusal(error: BaseException) -> bool:
    """Whether kdengine raised this itself, in words for the user, or a file could not be opened.

    Everything else is a bug, here or in a library, and its traceback must be seen.
    """
    if isinstance(error, OSError) and error.filename:
        return True
    if not isinstance(error, ValueError | TypeError | RuntimeError | OSError):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or PACKAGE not in Path(place.tb_frame.f_code.co_filename).resolve().parents:
        return False
    # by a raise statement, rather than in a call such as int("x")
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
