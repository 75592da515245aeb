# SPDX-License-Identifier: Apache-2.0
"""Asked to stop under the deepspeed launcher: one complete checkpoint, no process left."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kdengine import checkpoint
from kdengine.stop import EXIT_STOPPED

# what a signal reaches, and the exit codes that the caller of deepspeed may see: the runner dies
# of a signal itself, launch.py answers its own SIGTERM with 1, a rank's code is passed on
TARGETS = {
    "runner": (signal.SIGTERM, {-signal.SIGTERM}),
    "launcher": (signal.SIGTERM, {1}),
    "rank": (signal.SIGUSR1, {EXIT_STOPPED}),
    "group": (signal.SIGTERM, {-signal.SIGTERM}),
    "keyboard": (signal.SIGINT, {1, -signal.SIGINT}),
}
SAVED_WITHIN_S = 25


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def launch(repository: Path, words: list[str], out: Path) -> subprocess.Popen:
    """``deepspeed --num_accelerators 2 kdengine/train.py ...`` in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_accelerators", "2", "--master_port", str(port)),
        *(str(repository / "kdengine" / "train.py"), *words),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with out.open("w") as text:
        return subprocess.Popen(
            command,
            env={**os.environ, "PATH": path},
            cwd=out.parent,
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def descendants(process: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    """The processes of a launch: the runner, launch.py, and the ranks."""
    runner = psutil.Process(process.pid)
    (launcher,) = runner.children()
    return {"runner": [runner], "launcher": [launcher], "rank": launcher.children()}


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launched(repository: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """``launched(words)``: deepspeed with two ranks; what is left of it is killed at the end."""
    started: list[psutil.Process] = []

    def run(words: list[str]) -> subprocess.Popen:
        process = launch(repository, words, tmp_path / "console.txt")
        started.append(psutil.Process(process.pid))
        return process

    yield run
    for group in {process.pid for process in started}:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.parametrize("target", TARGETS)
def test_signal_leaves_one_checkpoint_and_no_process(
    launched, words, records, tmp_path, target
) -> None:
    run, out = tmp_path / "runs" / "a", tmp_path / "console.txt"
    stage = list(TARGETS).index(target) % 4
    process = launched(words("a", train__steps=100000, train__zero_stage=stage))
    wait_for(lambda: process.poll() is not None or (run / "metrics.jsonl").exists(), 120, "a step")
    assert process.poll() is None, out.read_text()
    family = descendants(process)
    sent, codes = TARGETS[target]
    if target in ("group", "keyboard"):
        os.killpg(process.pid, sent)
    else:
        family[target][-1].send_signal(sent)
    saved = run / "checkpoints" / "latest"
    wait_for(saved.exists, SAVED_WITHIN_S, f"a checkpoint\n{out.read_text()[-3000:]}")
    # again, while all are leaving: must not matter
    for rank in filter(running, family["rank"]):
        rank.send_signal(signal.SIGTERM)
    everyone = [one for some in family.values() for one in some]
    wait_for(lambda: not any(map(running, everyone)), 40, "all processes to end")
    assert process.wait() in codes, out.read_text()[-3000:]
    (only,) = checkpoint.checkpoints(run)
    assert checkpoint.read_meta(only)["state"]["step"] == records(run)[-1]["step"]
    assert not list((run / "checkpoints").glob(".partial_*"))
    checkpoint.export_run(run, tmp_path / "exported")


def test_runner_that_dies_while_ranks_start_leaves_nothing_behind(
    launched, words, tmp_path
) -> None:
    process = launched(words("a", train__steps=100000))
    wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 3, 60, "ranks")
    family = descendants(process)
    process.terminate()
    everyone = [one for some in family.values() for one in some]
    wait_for(lambda: not any(map(running, everyone)), 60, "all processes to end")
    assert checkpoint.find(tmp_path / "runs" / "a", "latest") is None


# SIGTERM arrives while the student is being evaluated after step 2
STOPPED_IN_EVALUATION = """
import os, signal, sys
from kdengine import loop, train
evaluate, calls = loop.evaluate, []
def interrupted(job):
    calls.append(job.state.step)
    if calls == [2]:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(job)
loop.evaluate = interrupted
sys.exit(train.main(sys.argv[1:]))
"""


def test_stop_abandons_an_evaluation_and_resume_makes_up_for_it(
    python, train_here, words, shards, tmp_path
) -> None:
    run = tmp_path / "runs" / "a"
    line = words("a", train__steps=4, eval__val_frequency=2, eval__retrieval=f"seen={shards}")
    done = python(["-c", STOPPED_IN_EVALUATION, *line])
    assert done.returncode == EXIT_STOPPED, done.stdout + done.stderr
    assert not (run / "eval.jsonl").exists()
    assert checkpoint.find(run, "latest").name == checkpoint.step_name(2)
    ((code, error),) = train_here([*line, "--resume", "latest"])
    assert code == 0, error
    evaluated = [json.loads(x) for x in (run / "eval.jsonl").read_text().splitlines()]
    assert [x["step"] for x in evaluated] == [2, 4]
    assert 0 <= evaluated[1]["seen/image_to_text_R@1"] <= 1
