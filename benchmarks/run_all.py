# SPDX-License-Identifier: Apache-2.0
"""Everything worth knowing about the kernels on one machine, in one command and a fixed time.

    python benchmarks/run_all.py --out DIR [--minutes 9] [--parts smoke,tests,similarity,...]

In order: what the machine is, the extension, a smoke test of every kernel, the GPU
tests, then the benchmarks, most important first: the kernels, the loader, the whole step. Each part
is a process of its own with a time of its own; one that crashes or hangs is started again behind
the row where it did, so nothing stops what follows. DIR gets each row when it is measured, and the
log of everything.

DIR: environment.json, log.txt, smoke.jsonl, tests.xml, similarity.jsonl, feature.jsonl,
assign.jsonl, data.jsonl, step.jsonl, distributed.jsonl, distributed.svg, summary.txt.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, peers, race  # noqa: E402
from kdengine.ops import extension  # noqa: E402

PARTS = ("smoke", "tests", "similarity", "feature", "assign", "distributed", "data", "step")
# seconds that the parts before leave to a part
KEPT_S = {"similarity": 30.0, "feature": 30.0, "assign": 20.0, "distributed": 45.0}
KEPT_S |= {"data": 45.0, "step": 60.0}
# seconds: of what is silent for so long; kept for writing the summary; of the least useful part
SILENCE_S, SUMMARY_S, LEAST_S = 120.0, 5.0, 10.0
MAX_STARTS = 8
KERNEL_TESTS = ("test_kernels", "test_assign", "test_losses")
OTHER_PACKAGES = ("rich", "numpy", "pytest", "deepspeed", "memeff", "inf_cl", "liger_kernel")
OTHER_PACKAGES += ("cut_cross_entropy", "fla_core", "flash_linear_attention")


class Part(NamedTuple):
    """A command, and how much of the time it may have.

    Attributes:
        name: as in ``--parts``.
        command: its arguments, without the interpreter.
        limit_s: at most.
        reserve_s: left for the parts behind it.
        resumes: goes on behind its rows when started again with ``--resume``.
    """

    name: str
    command: list[str]
    limit_s: float
    reserve_s: float
    resumes: bool


class Console:
    """The terminal and the log at once."""

    def __init__(self, log: IO[str]) -> None:
        self.log = log
        self.last = time.monotonic()

    def say(self, line: str) -> None:
        """One line to both."""
        self.last = time.monotonic()
        for file in (sys.stdout, self.log):
            print(line, file=file, flush=True)


def run(command: Sequence[str], seconds: float, console: Console) -> int | None:
    """Run a command, its output to the console; None if it was ended for time or silence."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment_variables(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # a group of its own, to be ended with its compilers and workers
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = process.stdout

    def read() -> None:
        for line in lines:
            console.say(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    end = time.monotonic() + seconds
    console.last = time.monotonic()
    reason = None
    try:
        while process.poll() is None and reason is None:
            time.sleep(0.1)
            now = time.monotonic()
            if now >= end or now - console.last > SILENCE_S:
                reason = "its time is up" if now >= end else f"silent for {SILENCE_S:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(timeout=5)
    if reason is None:
        return process.returncode
    console.say(f"-- ended: {reason}")
    return None


def environment_variables() -> dict[str, str]:
    """Those of this process, the source roots, and the interpreter just where it is needed."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        found["TRITON_INTERPRET"] = "1"
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_part(part: Part, end: float, console: Console) -> tuple[bool, str]:
    """Run one part, again and again behind what crashes; whether all is right, and in words."""
    begin, code = time.monotonic(), None
    limit = min(begin + part.limit_s, end - part.reserve_s)
    for start in range(MAX_STARTS):
        left = limit - time.monotonic()
        if left < LEAST_S:
            break
        budget = ["--budget-s", f"{left - 5:.0f}"] if part.name == "similarity" else []
        again = ["--resume"] if start else []
        console.say(f"== {part.name} {' '.join(again)} ({left:.0f} s)")
        code = run([sys.executable, *part.command, *budget, *again], left, console)
        if not part.resumes or code in (0, race.WRONG):
            break
        console.say(f"-- {part.name} ended with {code}")
    took = time.monotonic() - begin
    meaning = {0: "done", race.WRONG: "done, something is wrong", None: "cut short"}
    return code == 0, f"{part.name}: {meaning.get(code, f'exit code {code}')}, {took:.0f} s"


def parts_of(names: Sequence[str], out: Path) -> list[Part]:
    """The parts asked for, in their order."""
    is_gpu = torch.cuda.is_available()
    # the kernels' first: the rest needs packages that may be missing
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"), key=lambda p: p.stem not in KERNEL_TESTS)
    tests = ["-m", "pytest", *map(str, files), "-m", "gpu", "-v", "--tb=short"]
    tests += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-o", "timeout=60"]
    tests += [f"--junitxml={out / 'tests.xml'}"]
    small = [] if is_gpu else ["--rows", "128", "--seconds", "0.2", "--threads", "1"]
    few_keys = [] if is_gpu else [*small, "--keys", "256", "--width", "64"]
    ranks = ["--plot", str(out / "distributed.svg")]
    if not is_gpu:
        ranks += ["--sizes", "2", "--counted", "512", "64", "--seconds", "0.1"]
    few = ["--passes", "0", "--seconds", "2"]
    sizes = [["--repeats", "3"], ["--batch", "256", "--rounds", "3"]]
    if not is_gpu:
        sizes = [["--repeats", "2", "--size", "64", "--batch", "32", "--cores", "1"],
                 ["--batch", "8", "--steps", "2", "--rounds", "2", "--threads", "1",
                  "--modes", "no teacher", "InfoNCE + CRD"]]  # fmt: skip
    found = {
        "smoke": Part("smoke", ["benchmarks/smoke.py"], 120, 0, True),
        "tests": Part("tests", tests, 150, 0, False),
        "similarity": Part("similarity", ["benchmarks/bench_similarity.py", *small], 480, 0, True),
        "feature": Part("feature", ["benchmarks/bench_feature.py", *small], 60, 0, True),
        "assign": Part("assign", ["benchmarks/bench_assign.py", *few_keys], 60, 0, True),
        "distributed": Part(
            "distributed", ["benchmarks/bench_distributed.py", *ranks], 90, 0, True
        ),
        "data": Part("data", ["benchmarks/bench_data.py", *few, *sizes[0]], 120, 0, True),
        "step": Part("step", ["benchmarks/bench_step.py", *sizes[1]], 240, 0, True),
    }
    asked = [part for name, part in found.items() if name in names]
    return [
        part._replace(
            command=part.command
            + (["--json", str(out / f"{part.name}.jsonl")] if part.resumes else []),
            reserve_s=sum(KEPT_S.get(later.name, 0.0) for later in asked[number + 1 :]),
        )
        for number, part in enumerate(asked)
    ]


def environment(out: Path, console: Console) -> None:
    """Write and print what the machine is and what of the peers is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = common.machine(device)
    found["packages"] = {name: common.version(name) for name in OTHER_PACKAGES}
    missing = {peer.name: peers.importable(peer.modules) for peer in peers.PEERS}
    found["missing_peers"] = {name: reason for name, reason in missing.items() if reason}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["processors"] = properties.multi_processor_count
    (out / "environment.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.say(json.dumps(found))


def build(end: float, console: Console) -> tuple[bool, str]:
    """Build the extension; on a machine without a GPU only where it is missing."""
    if not torch.cuda.is_available() and not extension.why_not("cpu"):
        return True, "build: the extension is there"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = run(command, min(180.0, end - time.monotonic()), console)
    return code == 0, "build: done" if code == 0 else f"build: failed with {code}"


def summary(out: Path) -> list[tuple[bool, str]]:
    """The rows of all files in a line each, and whether it matters: ours, what is wrong."""
    lines = []
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            names = ("objective", "variant", "case", "rows", "size", "width", "scale", "dtype")
            names += ("backend",)
            what = " ".join(str(row[name]) for name in names if row.get(name) is not None)
            if row.get("reason"):
                lines.append((True, f"{path.stem}: {what}: {row['reason'][:160]}"))
            elif "forward_backward" in row:
                ratios = ("share_minimum", "share_bandwidth", "time_vs_eager", "time_vs_compiled")
                told = " ".join(f"{x} {row[x]:.2f}" for x in ratios if row.get(x) is not None)
                both = row["forward_backward"]["median_ms"]
                kernel = row["backend"].split()[0] in ("triton", "cuda")
                lines.append((kernel, f"{path.stem}: {what}: {both:.3f} ms {told}"))
            elif "time" in row:
                told = f"{row['time']['median_ms']:.3f} ms vs eager {row['time_vs_eager']:.2f}"
                lines.append((row["backend"] == "triton", f"{path.stem}: {what}: {told}"))
            elif "loss_ms" in row:
                told = f"W = {row['size']} {row['loss_ms']:.3f} ms"
                told += f" exposed {row['exposed_ms']:.3f} ms" if "exposed_ms" in row else ""
                lines.append((row["case"] != "model", f"{path.stem}: {what}: {told}"))
            elif "bytes_ratio" in row:
                told = f"bytes {row['bytes_ratio']:.3f} FLOPs {row['flops_ratio']:.3f} of open_clip"
                lines.append((True, f"{path.stem}: {what}: {told}"))
            elif "samples_per_second" in row:
                ratios = ("ratio", "time_vs_no_teacher", "time_vs_open_clip", "phases_share")
                told = " ".join(f"{x} {row[x]:.2f}" for x in ratios if row.get(x) is not None)
                rate = row["samples_per_second"]
                lines.append((True, f"{path.stem}: {what}: {rate:.0f} samples/s {told}"))
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole")
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {sorted(unknown)} came; there are {', '.join(PARTS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes - SUMMARY_S
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jsonl"):
        # rows of an earlier run would be taken for this one's
        old.unlink()
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        console = Console(log)
        environment(out, console)
        endings = [build(end, console)]
        console.say(f"== {endings[0][1]}")
        for part in parts_of(options.parts, out):
            try:
                endings.append(run_part(part, end, console))
            except Exception as error:
                endings.append((False, f"{part.name}: {race.in_one_line(error)}"))
            console.say(f"== {endings[-1][1]}")
        lines = [*summary(out), *((True, words) for _, words in endings)]
        text = "\n".join(line for _, line in lines)
        (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
        for matters, line in lines:
            if matters:
                console.say(line)
    return 0 if all(right for right, _ in endings) else race.WRONG


if __name__ == "__main__":
    sys.exit(main())
