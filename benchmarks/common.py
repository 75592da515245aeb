# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, peak memory, the machine, tables, JSON lines."""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# the profiler complains about a machine without a GPU
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Spread(NamedTuple):
    """Median and 20th and 80th percentile, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def time_interleaved(
    variants: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Spread]:
    """Time the variants in turn, so that a busy moment of the machine hits all of them.

    Warm-up: each once. Then rounds of all until ``seconds`` have passed, at least five.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(x) for x in times.values()) < 5:
        for name, run in variants.items():
            times[name].append(_time_ms(run, device))
    return {name: _spread(values) for name, values in times.items()}


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    # a buffer larger than the L2 cache, so that no variant finds its inputs there
    torch.empty(256 * MIB, dtype=torch.int8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def _spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory torch's allocator held during ``run``, above what it held before.

    On the CPU from the allocator's own events, as the profiler records them; what a matrix
    library allocates for itself does not count on either device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(device: torch.device) -> dict[str, Any]:
    """Everything a number depends on: commit, hardware, versions, threads."""
    is_gpu = device.type == "cuda"
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "open_clip_torch")},
    }


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(120, Console().width)).print(table)


def append_json(path: str | None, row: dict[str, Any]) -> None:
    """Add one JSON line to a file, if one was asked for."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    dirty = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + dirty


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
