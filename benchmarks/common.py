# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, peak memory, the machine, tables, JSON lines."""

import argparse
import functools
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
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
# larger than any L2 cache
FLUSH_BYTES = 256 * MIB
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# on a CPU; seconds of the processor are nearly the same on a busy machine
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PACKAGES = ("torch", "triton", "open_clip_torch")
# what tells one row of a journal from another
IDENTITY = ("benchmark", "objective", "case", "rows", "width", "teacher_width", "scale", "dtype")
IDENTITY += ("backend", "size", "cores", "recipe", "variant", "seed", "settings")
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


class Spread(NamedTuple):
    """Median and 20th and 80th percentile, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def time_interleaved(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    clock: str = "wall",
) -> dict[str, Spread]:
    """Time the variants in turn, so that a busy moment of the machine hits all of them.

    Warm-up: each for a twentieth of ``seconds``. Then rounds of all until ``seconds`` have passed,
    at least five; at least three where five would take four times as long. In a round, a variant
    that is much faster than the slowest runs up to six times. ``clock`` is one of ``CLOCKS``.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    warm: dict[str, float] = {}
    for name, run in variants.items():
        end = time.perf_counter() + seconds / 20
        run()
        warm[name] = time_ms(run, device, clock)
        while time.perf_counter() < end:
            warm[name] = time_ms(run, device, clock)
    slowest = max(warm.values(), default=0.0)
    repeats = {name: max(1, min(6, int(slowest / (4 * x)))) for name, x in warm.items()}
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        passed = time.perf_counter() - start
        if number >= MIN_ROUNDS and passed >= seconds or number >= 3 and passed >= 4 * seconds:
            break
        for name, run in variants.items():
            times[name] += [time_ms(run, device, clock) for _ in range(repeats[name])]
    return {name: _spread(values) for name, values in times.items()}


def time_ms(run: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Time of one run."""
    if device.type != "cuda":
        read = CLOCKS[clock]
        start = read()
        run()
        return 1e3 * (read() - start)
    # no variant finds its inputs in the L2 cache
    _flush_buffer(device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


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
    """Everything a number depends on: commit, hardware, versions, threads, state of the GPU."""
    is_gpu = device.type == "cuda"
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **({"cuda": torch.version.cuda, **gpu_state()} if is_gpu else {}),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks (MHz), temperature (C) and power (W) as nvidia-smi tells them; {} without."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = (x.strip() for x in done.stdout.splitlines()[0].split(","))
    return dict(zip(SMI_FIELDS, values, strict=False))


class Journal:
    """A file of JSON lines, one a row, that survives the end of the process at any row.

    ``start`` notes what is about to run. After a crash or a kill, the journal opened with
    ``resume`` writes a row that says so and knows all rows, so that the next process goes on
    behind it.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        self.path = Path(path) if path else None
        self.known: set[tuple] = set()
        self.timed: set[tuple] = set()
        name = hashlib.sha256(str(self.path and self.path.resolve()).encode()).hexdigest()[:16]
        # not beside the file, where it might be taken for a result
        self.marker = Path(tempfile.gettempdir()) / f"kdengine-journal-{name}-{os.getuid()}"
        if self.path and resume and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._know(json.loads(line))
            if self.marker.exists():
                identity = json.loads(self.marker.read_text())
                self.add(identity, reason="the process crashed or hung here")
        self.rest()

    def has(self, identity: dict[str, Any]) -> bool:
        """Whether there is a row of this identity."""
        return _key(identity) in self.known

    def has_times(self, identity: dict[str, Any]) -> bool:
        """Whether a backend of this problem was timed; all rows of a problem come together."""
        return _key({**identity, "backend": None}) in self.timed

    def start(self, identity: dict[str, Any]) -> None:
        """Note what runs from now on."""
        if self.path:
            self.marker.write_text(json.dumps(identity))

    def rest(self) -> None:
        """Note that nothing runs."""
        self.marker.unlink(missing_ok=True)

    def add(self, identity: dict[str, Any], **values: Any) -> None:
        """Write the row of what was started."""
        append_json(self.path, {**identity, **values})
        self._know({**identity, **values})
        self.rest()

    def _know(self, row: dict[str, Any]) -> None:
        self.known.add(_key(row))
        if "forward_backward" in row:
            self.timed.add(_key({**row, "backend": None}))


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row.get(name) for name in IDENTITY)


def is_device_lost() -> bool:
    """Whether an earlier error has made the GPU unusable for this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left", box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(160, Console().width)).print(table)


def append_json(path: str | Path | None, row: dict[str, Any]) -> None:
    """Add one JSON line to a file, if one was asked for."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def add_timing_options(parser: argparse.ArgumentParser, on_gpu: bool) -> None:
    """The options of a benchmark that times its sizes one by one into a journal."""
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[not on_gpu])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a size, about")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    """By which clock a CPU is timed."""
    told = "processor: seconds of the CPU, of all threads together, so with one thread"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=told)


class Refusal(RuntimeError):
    """What the user of a script can mend."""


def command(main: Callable[[], int]) -> int:
    """The exit code of a script's ``main``; what its user can mend is one line and code 2."""
    from kdengine import errors

    try:
        return main()
    except Exception as error:
        if not isinstance(error, Refusal) and not errors.is_refusal(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_REFUSED


@functools.cache
def _commit() -> str:
    # a copy of the tree without its history is told by its maker
    if "KDENGINE_COMMIT" in os.environ:
        return os.environ["KDENGINE_COMMIT"]

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
        except OSError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    commit = git("rev-parse", "--short", "HEAD")
    is_clean = commit == "unknown" or not git("status", "--porcelain", "--untracked-files=no")
    return commit if is_clean else f"{commit}+changes"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def version(name: str) -> str | None:
    """Installed version of a distribution; None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
