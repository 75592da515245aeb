# SPDX-License-Identifier: Apache-2.0
"""Worker processes that may die: a task that kills its worker is named, and the rest goes on.

The processes are started afresh and not forked, so threads, GPU state and the caller's main module
do not matter to them. When the caller is gone, however it ended, they end at their next report.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

# a task's function is called with the task and a function that reports progress
Advance = Callable[[int, int], None]
Function = Callable[[Any, Advance], Any]

_SERVE = "import sys; from kdengine.data.workers import serve; serve(int(sys.argv[1]))"


class WorkerDied(NamedTuple):
    """Stands for the result of a task whose worker died; the exit code, or minus the signal."""

    returncode: int


def num_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """Runs importable functions in worker processes, in the order of completion.

    With `num_workers` 0 everything runs in the calling process.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._idle: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle:
            worker.stop()
        self._idle.clear()

    def run(
        self, function: Function, tasks: Sequence[Any], advance: Advance = lambda *_: None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, result or `WorkerDied`) as the tasks end.

        Args:
            function: found by its module and name in the worker.
            tasks: one argument each, picklable.
            advance: receives what the function reports through its second argument.

        Raises:
            Exception: whatever the function raised, with the worker's traceback as a note.
            RuntimeError: worker processes cannot be started.
        """
        if self._num_workers == 0:
            for number, task in enumerate(tasks):
                yield number, function(task, advance)
            return
        waiting = deque(enumerate(tasks))
        busy: dict[Connection, tuple[_Worker, int]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self._num_workers:
                    worker = self._idle.pop() if self._idle else _Worker()
                    try:
                        worker.connection.send((function, waiting[0][1]))
                    except BrokenPipeError:
                        # it died while idle; the task is still waiting
                        worker.stop()
                        continue
                    busy[worker.connection] = (worker, waiting.popleft()[0])
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker, number = busy[connection]
                    kind, *values = worker.receive()
                    if kind == "advance":
                        advance(*values)
                        continue
                    del busy[connection]
                    if kind == "died":
                        yield number, WorkerDied(values[0])
                        continue
                    self._idle.append(worker)
                    if kind == "error":
                        error, trace = values
                        error.add_note(f"in a worker process:\n{trace}")
                        raise error
                    yield number, values[0]
        finally:
            for worker, _ in busy.values():
                worker.process.kill()
                worker.stop()


class _Worker:
    """One process and the connection to it."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # the pool is the parallelism: one thread each for the maths libraries
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        if self.receive()[0] != "ready":
            raise RuntimeError(
                f"index: a worker process did not start (exit code {self.process.returncode}); "
                "its own message is above. 'kdengine index --workers 0' stays in one process"
            )

    def receive(self) -> tuple[Any, ...]:
        """The next message; ("died", returncode) when there will be none."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.connection.close()
            return "died", self.process.wait()

    def stop(self) -> None:
        """End the process: it leaves when its connection closes."""
        self.connection.close()
        self.process.wait()


def serve(fd: int) -> None:
    """Body of a worker process: run what comes through the connection until it closes."""
    # the caller reacts to an interrupt and then closes the connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(fd)

    def advance(num_samples: int, num_bytes: int) -> None:
        connection.send(("advance", num_samples, num_bytes))

    connection.send(("ready",))
    while True:
        try:
            function, task = connection.recv()
        except EOFError:
            return
        try:
            message: tuple[Any, ...] = ("result", function(task, advance))
        except BrokenPipeError:
            return
        except Exception as error:
            message = ("error", error, traceback.format_exc())
        connection.send(message)
