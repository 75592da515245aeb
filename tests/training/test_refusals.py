# SPDX-License-Identifier: Apache-2.0
"""A run that cannot be as asked for: one line, exit code 2, no traceback, whatever launched it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdengine.errors import EXIT_REFUSED
from kdengine.stop import EXIT_STOPPED

# settings that cannot work, and what the line must say of them
REFUSED = {
    "no teacher": ({"method__name": "clip_kd"}, "--distill.distill-model"),
    "absent teacher": (
        {"method__name": "clip_kd", "distill__distill_model": "local-dir:/absent/teacher"},
        "/absent/teacher",
    ),
    "absent checkpoint": ({"run__resume": "7"}, "step_00000007"),
    "batch": ({"train__batch_size": 1000}, "1000"),
    "absent data": ({"data__train_data": "/absent/{0..3}.tar"}, "/absent/0.tar"),
}


def complaint(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "Traceback" not in text, text
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_one_process_says_it_in_a_line(python, repository, words, case) -> None:
    fields, expected = REFUSED[case]
    done = python([str(repository / "kdengine" / "train.py"), *words("a", **fields)])
    assert done.returncode == EXIT_REFUSED, done.stdout + done.stderr
    assert expected in complaint(done.stderr)


@pytest.mark.parametrize("case", ["no teacher", "absent data"])
def test_of_two_ranks_one_says_it(repository, words, tmp_path, case) -> None:
    fields, expected = REFUSED[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_accelerators", "2", "--master_port", str(port)),
        *(str(repository / "kdengine" / "train.py"), *words("a", **fields)),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == EXIT_REFUSED, done.stdout + done.stderr
    assert expected in complaint(done.stderr)


def test_a_second_run_in_the_folder_is_refused(python, repository, words) -> None:
    line = [str(repository / "kdengine" / "train.py"), *words("a", train__steps=1)]
    assert python(line).returncode == 0
    done = python(line)
    assert done.returncode == EXIT_REFUSED, done.stdout + done.stderr
    assert "--resume latest" in complaint(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_imports_is_answered(repository, words, tmp_path, number) -> None:
    process = subprocess.Popen(
        [sys.executable, str(repository / "kdengine" / "train.py"), *words("a")],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    # python itself is up by then, torch is not
    time.sleep(1.0)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, told
    assert signal.Signals(number).name in told and "Traceback" not in told
    assert not (tmp_path / "runs").exists()


def test_a_taken_port_is_named_with_the_option_for_another(python, repository, words) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        paths = os.pathsep.join([str(repository), str(repository / "kernels")])
        done = python(
            [str(repository / "kdengine" / "train.py"), *words("a")],
            env={**os.environ, **place, **rank, "PYTHONPATH": paths},
        )
    assert done.returncode == EXIT_REFUSED, done.stdout + done.stderr
    assert "--master_port" in complaint(done.stderr)
