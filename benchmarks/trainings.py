# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of trainings share: running ``kdengine/train.py``, its cost, page tables."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from kdengine.log import METRICS, read

# what a process that is a rank has in its environment
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
LAUNCHER += ("MASTER_PORT",)
# a training that takes longer hangs
LONGEST_S = 3600.0


def run_here(words: Sequence[str], log: Path, out: Path) -> str | None:
    """Run Python with these words in a process of its own; why it failed, or None.

    Args:
        words: what follows the interpreter.
        log: gets its output.
        out: where recipes of the demo look for data and teacher (``KDENGINE_DEMO``).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # what ends this process ends the training, too
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env=environment(out),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LONGEST_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return f"no end within {LONGEST_S:.0f} s; see {log}"
    finally:
        signal.signal(signal.SIGTERM, before)
    if done.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8").strip().splitlines() or [""]
    return f"exit code {done.returncode}: {lines[-1][:200]}; see {log}"


def environment(out: Path) -> dict[str, str]:
    """Variables of a training: source roots, threads that wait asleep, no group of this process."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    found = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    found["KDENGINE_DEMO"] = str(out)
    found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    found.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return found


def cost(*folders: Path) -> dict[str, float]:
    """Training time, speed and memory of a run; one in stages has several folders."""
    runs = [read(folder / METRICS) for folder in folders]
    steps = [step for run in runs for step in run]
    return {
        "steps": sum(run[-1]["step"] for run in runs),
        "train_time_s": round(sum(run[-1]["time_s"] for run in runs), 1),
        "step_time_ms": round(statistics.median(step["step_time_ms"] for step in steps), 1),
        "peak_memory_mib": round(max(run[-1]["peak_memory_mib"] for run in runs)),
    }


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of a page."""
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def machine_words(row: dict[str, Any]) -> str:
    """Where a row was measured."""
    return f"{row['device']}, {row['num_cores']} cores, torch {row['torch']}"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; [] if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
