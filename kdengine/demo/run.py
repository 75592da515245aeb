# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end, with the commands that a user would type.

Draws a data set, trains a teacher on it, trains the same small student twice with the same budget,
without and with that teacher, writes a report and says whether distillation helped.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdengine.demo.shards import Sizes, render_data
from kdengine.log import EVALUATIONS, METRICS, read

ROOT = Path(__file__).resolve().parents[2]
# run folder -> recipe, in the order in which they run
RUNS = {
    "teacher": "demo_teacher",
    "student": "demo_student",
    "student_distilled": "demo_student_distilled",
}
TITLES = {
    "teacher": "a teacher, method clip",
    "student": "a small student, method clip",
    "student_distilled": "the same student, method clip_kd, taught by the teacher",
}


def main(
    out: Path | str = Path("runs/demo"),
    seed: int = 0,
    *,
    num_accelerators: int = 1,
    overrides: Sequence[str] = (),
    sizes: Sizes | None = None,
) -> int:
    """Run the demo.

    Args:
        out: folder for everything that it writes: data, one folder a run, report.html.
        seed: of the data, of all weights and of all orders.
        num_accelerators: ranks of each training.
        overrides: further words for every training, such as ``--train.steps 20``.
        sizes: how many pictures to draw.

    Returns:
        The exit code: 0 when the distilled student is ahead on every metric, else 1.

    Raises:
        RuntimeError: a training or the report failed; the message names the log.
        FileExistsError: ``out`` holds something that the demo did not write.
    """
    console, out, start = Console(highlight=False), Path(out).resolve(), time.monotonic()
    num_stages = len(RUNS) + 2

    def stage(number: int, title: str) -> None:
        elapsed = time.monotonic() - start
        console.rule(f"[bold]{number}/{num_stages}  {title}[/]  ({elapsed:.0f} s)", align="left")

    stage(1, "pictures and captions")
    drawn = render_data(out / "data", seed, sizes)
    console.print(f"{'drew' if drawn else 'found'} {out / 'data'}")
    environment = _environment(out)
    for number, (name, recipe) in enumerate(RUNS.items(), 2):
        stage(number, TITLES[name])
        _clear(out / name)
        # a port of its own, so that two demos, or other launchers, do not meet
        words = ["--num_accelerators", str(num_accelerators), "--master_port", str(_free_port())]
        words += [str(ROOT / "kdengine" / "train.py"), "--recipe", recipe]
        words += ["--train.seed", str(seed), *overrides]
        _call([_deepspeed(), *words], environment, console, out / name / "out.log")
    stage(num_stages, "report")
    report = out / "report.html"
    words = ["-m", "kdengine.cli", "report", *(str(out / name) for name in RUNS)]
    _call([sys.executable, *words, "--out", str(report)], environment, console, None)
    results = {name: last_evaluation(out / name) for name in RUNS}
    console.print(table(results))
    ahead, verdict = judge(results["student"], results["student_distilled"])
    console.print(f"[bold {'green' if ahead else 'red'}]{verdict}[/]")
    console.print(f"{report}  ({time.monotonic() - start:.0f} s in all)", soft_wrap=True)
    return 0 if ahead else 1


def last_evaluation(run: Path) -> dict[str, float]:
    """The recalls and accuracies of a run's last evaluation; ranks are left out.

    Raises:
        RuntimeError: the run has no evaluation.
    """
    records = read(run / EVALUATIONS)
    if not records:
        raise RuntimeError(f"demo: {run / EVALUATIONS} holds no evaluation; run the demo again")
    last = records[-1]
    # how many classes compete is no merit of a run
    left_out = ("step", "_rank", "/zeroshot-classes")
    return {name: last[name] for name in last if not name.endswith(left_out)}


def judge(alone: Mapping[str, float], distilled: Mapping[str, float]) -> tuple[bool, str]:
    """Whether the distilled student is ahead on every metric, and a line that says so."""
    gains = {name: 100 * (distilled[name] - value) for name, value in alone.items()}
    behind = [f"{name} ({gain:+.1f})" for name, gain in gains.items() if not gain > 0]
    mean = sum(gains.values()) / len(gains)
    if behind:
        return False, f"The distilled student is not ahead on: {', '.join(behind)}."
    return True, (
        f"The distilled student is ahead on all {len(gains)} metrics, by {mean:.1f} points on "
        f"average (from {min(gains.values()):+.1f} to {max(gains.values()):+.1f})."
    )


def table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """One row a metric, one column a run, and the gain of the distilled student."""
    shown = Table(title="last evaluation, percent", title_justify="left")
    shown.add_column("metric", no_wrap=True)
    for name in results:
        shown.add_column(name.rpartition("_")[2], justify="right")
    shown.add_column("gain", justify="right")
    for metric, alone in results["student"].items():
        distilled = results["student_distilled"][metric]
        gain = 100 * (distilled - alone)
        colour = "green" if gain > 0 else "red"
        cells = [f"{100 * values[metric]:.1f}" for values in results.values()]
        shortened = metric.replace("mean-per-class-recall", "per-class").replace("_to_", ">")
        shown.add_row(shortened, *cells, f"[{colour}]{gain:+.1f}[/]")
    return shown


def _environment(out: Path) -> dict[str, str]:
    """What the recipes and the processes need; a machine without a GPU is told so."""
    found = dict(os.environ)
    found["KDENGINE_DEMO"] = str(out)
    paths = [str(ROOT), str(ROOT / "kernels"), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # the launcher calls 'python', which must be this one
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    # threads that wait asleep: on a busy machine spinning ones cost several times the time
    found.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not Path("/dev/nvidiactl").exists():
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _deepspeed() -> str:
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise RuntimeError(
            f"demo: expected the command 'deepspeed' beside {sys.executable} or on PATH; "
            "install it as the README says (make setup)"
        )
    return found


def _clear(run: Path) -> None:
    """Remove a run of an earlier demo; the demo always starts anew.

    Raises:
        FileExistsError: the folder is not a run.
    """
    if run.is_dir() and any(run.iterdir()):
        left = ("config.toml", METRICS, "out.log", "checkpoints")
        if not any((run / name).exists() for name in left):
            raise FileExistsError(f"demo: {run} is not a run of the demo; remove it, or use --out")
        shutil.rmtree(run)


def _call(
    command: Sequence[str], environment: Mapping[str, str], console: Console, log: Path | None
) -> None:
    console.print(f"[dim]$ {' '.join(command)}[/]", soft_wrap=True)
    # a demo that is told to end takes its training along
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with subprocess.Popen(command, env=environment) as process:
            try:
                code = process.wait()
            except BaseException:
                # it ends its ranks; leaving this block waits for it
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        where = f"; {log} tells more" if log else ""
        raise RuntimeError(f"demo: the command above ended with code {code}{where}")
