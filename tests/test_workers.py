# SPDX-License-Identifier: Apache-2.0
"""Worker processes: their errors, their deaths, and their end."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from kdengine.data import build
from kdengine.data.causes import Fault
from kdengine.data.decode import find_failures
from kdengine.data.index import ensure_index
from kdengine.data.workers import WorkerDied, WorkerPool

TASKS = """
import os, signal, time

def check(images, advance):
    if any(b"kill me" in image for image in images):
        os.kill(os.getpid(), signal.SIGKILL)

def validate_part(task, advance):
    os.kill(os.getpid(), signal.SIGKILL)

def double(number, advance):
    if number == 3:
        os._exit(7)
    advance(1, number)
    return 2 * number

def tell_pid_and_go_on(path, advance):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    while True:
        advance(0, 0)
        time.sleep(0.01)
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that worker processes can import."""
    (tmp_path / "worker_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("worker_tasks", None)
    return importlib.import_module("worker_tasks")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_task_that_kills_its_worker_is_named_and_the_rest_is_done(
    tasks: ModuleType, num_workers: int
) -> None:
    reports = []
    with WorkerPool(num_workers) as pool:
        results = dict(pool.run(tasks.double, range(6), lambda *report: reports.append(report)))
    assert results == {0: 0, 1: 2, 2: 4, 3: WorkerDied(7), 4: 8, 5: 10}
    assert sorted(reports) == [(1, number) for number in (0, 1, 2, 4, 5)]


def test_error_in_a_worker_reaches_the_caller() -> None:
    with WorkerPool(1) as pool, pytest.raises(TypeError) as caught:
        list(pool.run(divmod, ["not a number"]))
    assert caught.value.__notes__[0].startswith("in a worker process")


def test_worker_ends_when_its_caller_is_killed(tasks: ModuleType, tmp_path: Path) -> None:
    code = (
        "import sys, worker_tasks; from kdengine.data.workers import WorkerPool\n"
        "list(WorkerPool(1).run(worker_tasks.tell_pid_and_go_on, [sys.argv[1]]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pid_file = tmp_path / "pid"
    caller = subprocess.Popen([sys.executable, "-c", code, str(pid_file)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline, "the worker did not start"
            time.sleep(0.02)
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    while Path("/proc", pid_file.read_text(), "cmdline").exists():
        # an orphan that nobody waits for stays as a zombie without a command line
        if not Path("/proc", pid_file.read_text(), "cmdline").read_bytes():
            break
        assert time.monotonic() < deadline, "the worker outlived its caller"
        time.sleep(0.02)


def test_image_that_kills_the_decoder_is_found(tasks: ModuleType) -> None:
    images = [b"one", b"two", b"kill me", b"four"]
    with build.IsolatedCheck(tasks.check) as check:
        failures = find_failures(images, check)
    assert failures == {2: Fault("image-crash", "the decoder's process ended with -9")}


def test_shard_whose_worker_died_is_done_again(
    tasks: ModuleType, test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "validate_part", tasks.validate_part)
    shard = str(test_data / "hostile-truncated.tar")
    index = ensure_index(shard, index_dir=str(tmp_path / "index"), num_workers=1)
    assert (index.num_samples, index.num_quarantined) == (6, 1)
