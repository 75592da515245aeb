# SPDX-License-Identifier: Apache-2.0
"""README's commands for several nodes, on two "nodes" of this machine: the run of one node."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# stands in for SLURM's own: a task on each of two nodes, the first of which is this machine
SRUN = """#!/bin/bash
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
DEEPSPEED, TORCHRUN = "deepspeed --hostfile hosts --no_ssh", "torchrun --nnodes"
SCONTROL = "#!/bin/bash\necho 127.0.0.1\necho localhost\n"


def block(repository: Path, start: str) -> str:
    """The lines of README's section on nodes from the one that begins with ``start``."""
    section = (repository / "README.md").read_text().split("## Several nodes")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^    ({re.escape(start)}.*(?:\n    .*)*)", section, re.MULTILINE)
    return re.sub(r"\n    ", "\n", found)


@pytest.fixture
def shell(repository: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """``shell(command, ...)``: bash in the repository, with torchrun, deepspeed, srun, scontrol."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fake / name).write_text(script)
        (fake / name).chmod(0o755)
    path = os.pathsep.join([str(fake), str(Path(sys.executable).parent), os.environ["PATH"]])

    def start(command: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=repository,
            env={**os.environ, "PATH": path, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def here(text: str, words: str, hosts: Path) -> str:
    """A command of README for this machine: one process on each of two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for pattern, with_ in (
        (r"\bnode0\b", "127.0.0.1"),
        (r"29500", str(port)),
        (r"--nproc-per-node 8", "--nproc-per-node 1"),
        (r"--hostfile hosts", f"--hostfile {hosts}"),
        (r"--recipe clip_kd \.\.\.", words),
    ):
        text = re.sub(pattern, with_.replace("\\", r"\\"), text)
    return text


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        told = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)


def test_readmes_torchrun_is_that_of_slurm(repository: Path) -> None:
    """So that running one of them is enough."""
    plain, batch = block(repository, TORCHRUN), block(repository, "#SBATCH")
    own = {"$SLURM_NNODES": "2", "$SLURM_NODEID": "0", "$MASTER": "node0"}
    inner = batch.split("'")[1].replace("\\\n", "")
    for name, value in own.items():
        inner = inner.replace(name, value)
    assert inner.split() == plain.split()


def test_nodes_started_as_readme_says_train_as_one(
    repository: Path, shell: Any, words: Any, records: Any, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    options = {"train__steps": 3, "train__accum_freq": 2, "train__batch_size": 8}

    def line_of(name: str) -> str:
        return shlex.join(words(name, **options))

    finish([shell(f"torchrun --nproc-per-node 2 kdengine/train.py {line_of('one')}")])
    line = here(block(repository, DEEPSPEED), line_of("deepspeed"), hosts)
    second = line.replace("--node_rank 0", "--node_rank 1")
    assert second != line
    finish([shell(line), shell(second)])
    # within README's single quotes
    quoted = line_of("slurm").replace("'", r"'\''")
    batch = here(block(repository, "#SBATCH"), quoted, hosts)
    finish([shell(batch, SLURM_NNODES="2", SLURM_JOB_NODELIST="node[0-1]")])
    runs = tmp_path / "runs"
    expected = [(r["loss"], r["grad_norm"], r["samples_seen"]) for r in records(runs / "one")]
    assert len(expected) == 3
    for name in ("deepspeed", "slurm"):
        found = [(r["loss"], r["grad_norm"], r["samples_seen"]) for r in records(runs / name)]
        assert found == expected, name
        assert "2 on cpu" in (runs / name / "out.log").read_text()
