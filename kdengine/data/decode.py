# SPDX-License-Identifier: Apache-2.0
"""Ask DALI's own CPU decoder which images it decodes; training on CPUs uses the same one."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kdengine.data.causes import Fault

# what a check makes of a batch of encoded images: None if all decode, else why not
Check = Callable[[Sequence[bytes]], Fault | None]

# DALI 2.4.0 parses the headers of a larger batch on several threads, and when one of them fails the
# others go on with memory that is gone: up to 4 * (num_threads + 1) images it uses one thread
MAX_BATCH = 8

# terminal colours and the log level that nvImageCodec puts before its messages
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|\[(ERROR|WARNING|FATAL ERROR)\] *")


def find_failures(images: Sequence[bytes], check: Check) -> dict[int, Fault]:
    """Numbers of the images that fail, with the fault: a batch that fails is halved.

    One bad image in a batch of n costs about 2 log2(n) further checks.
    """
    failures: dict[int, Fault] = {}
    parts = [range(len(images))] if images else []
    while parts:
        part = parts.pop()
        fault = check([images[number] for number in part])
        if fault is None:
            continue
        if len(part) == 1:
            failures[part[0]] = fault
        else:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
    return failures


class DaliCheck:
    """A `Check` of at most `MAX_BATCH` images, by a DALI pipeline on the CPU.

    Memory: the decoded batch, 3 bytes a pixel. The decoders' own complaints on stderr are caught;
    those about a single image become the reason.
    """

    def __init__(self) -> None:
        self._pipeline: Any = None

    def __call__(self, images: Sequence[bytes]) -> Fault | None:
        """None if every image decodes, else why the batch failed."""
        if self._pipeline is None:
            self._pipeline = _build()
        with _captured_stderr() as complaints:
            try:
                self._pipeline.feed_input(
                    "encoded", [np.frombuffer(image, np.uint8) for image in images]
                )
                self._pipeline.run()
            except RuntimeError as error:
                # a failed pipeline may crash when it runs again; a new one takes milliseconds
                self._pipeline = None
                return Fault("image-decode", _reason(complaints(), str(error)))
        return None


def _build() -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=MAX_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> tuple[Any, Any]:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        # only the shapes leave the pipeline; the peeked one is what training asks for first
        return fn.peek_image_shape(encoded, adjust_orientation=False), image.shape()

    pipeline = decode()
    pipeline.build()
    return pipeline


def _reason(complaints: str, error: str) -> str:
    lines = [line.strip() for line in _DECORATION.sub("", complaints).splitlines() if line.strip()]
    if lines:
        return lines[0][:300]
    told = error.partition("encountered:")[2].strip().splitlines() or error.splitlines()
    return told[0][:300]


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Send file descriptor 2 to a scratch file: C libraries write there past sys.stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as scratch:
        os.dup2(scratch.fileno(), 2)
        try:
            yield lambda: _content(scratch)
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _content(scratch: Any) -> str:
    scratch.seek(0)
    return scratch.read(65_536).decode("utf-8", "replace")
