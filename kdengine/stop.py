# SPDX-License-Identifier: Apache-2.0
"""Requests to stop a run: signals, and the disappearance of whoever launched it.

The ``deepspeed`` command is three storeys: the runner that the user started, ``launch.py``, and the
ranks. A signal to the runner kills the runner alone; ``launch.py`` passes SIGTERM to rank 0 first
and to the next rank when that one has ended. So no rank may act on its own: a rank records the
request here, and the training loop tells all ranks in its next step.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

EXIT_STOPPED = 75
"""Exit code of a run that saved a checkpoint because it was asked to stop (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.5


def leave_on_signal() -> None:
    """Until a ``Stop`` takes over, a request to stop ends this process with ``EXIT_STOPPED``."""
    for number in SIGNALS:
        signal.signal(number, _leave_now)


def ignore_signals() -> None:
    """This process is leaving anyway; a launcher that hurries it is no news."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_now(number: int, frame: FrameType | None) -> None:
    # not by an exception: this may come in the middle of an import
    os.write(2, f"asked to stop ({signal.Signals(number).name}): nothing to save\n".encode())
    os._exit(EXIT_STOPPED)


class Stop:
    """Remembers the first request to stop; a context manager that owns the signal handlers.

    While the run is being built (until ``ready``) a request ends this process at once with
    ``EXIT_STOPPED``: there is nothing to save. Afterwards it only sets ``reason``, and further
    signals change nothing, so that they cannot break the save.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._ready = False
        self._leaving = False
        self._closed = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        launchers = launcher_processes()
        if launchers and _orphaned(launchers[-1]):
            self.reason = "the runner disappeared before this rank had started"
            self._leave()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            # launch.py sends one more SIGTERM to ranks that are leaving, and tells how they ended
            signal.signal(number, signal.SIG_IGN if self.reason else handler)

    def ready(self) -> None:
        """From now on the caller looks at ``reason`` after every step."""
        self._ready = True
        if self.reason is not None:
            self._leave()

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason stays."""
        self.reason = self.reason or reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if not self._ready:
            self._leave()

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            print(f"asked to stop ({self.reason}): nothing to save", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STOPPED)

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self._closed.wait(POLL_SECONDS):
            gone = [process.pid for process in launchers if not _alive(process)]
            if gone:
                self.request(f"the launcher (process {gone[0]}) disappeared")
                if not self._ready:
                    os.kill(os.getpid(), signal.SIGTERM)
                return


def launcher_processes() -> list[psutil.Process]:
    """The launchers above this process, nearest first: launch.py and its runner, or torchrun.

    A shell or a scheduler above them is not one: a run outlives the terminal it was started from.
    """
    found: list[psutil.Process] = []
    if "RANK" not in os.environ:
        return found
    for process in psutil.Process().parents():
        if not _is_launcher(process):
            break
        found.append(process)
    return found


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    scripts = {Path(word).name for word in words[:3]}
    modules = set(words[:5]) & {
        "deepspeed.launcher.launch",
        "deepspeed.launcher.runner",
        "torch.distributed.run",
    }
    return bool(modules or scripts & {"deepspeed", "torchrun"})


def _orphaned(launcher: psutil.Process) -> bool:
    """Whether launch.py was adopted by the system: its runner was killed while ranks started."""
    try:
        parent = launcher.parent()
        adopted = parent is not None and (parent.pid == 1 or parent.name() == "systemd")
        return adopted and "deepspeed.launcher.launch" in launcher.cmdline()
    except psutil.Error:
        return True


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
