# SPDX-License-Identifier: Apache-2.0
"""What a run tells: the console, ``out.log``, ``metrics.jsonl``, ``eval.jsonl`` and TensorBoard.

Rank 0 alone writes; on the other ranks every call does nothing.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

METRICS, EVALUATIONS, TEXT, BOARD = "metrics.jsonl", "eval.jsonl", "out.log", "tensorboard"


class RunLog:
    """Writes a run's records and shows its progress.

    Args:
        folder: the run's folder.
        enabled: False on all ranks but the first.
        step: the step the run (re)starts from; records of later steps, left by a run that was
            interrupted after its last checkpoint, are removed so that curves stay clean.
        total: number of steps of the whole run.
        tensorboard: also write TensorBoard scalars.
        console: where to print; standard output by default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        step: int = 0,
        total: int = 0,
        tensorboard: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder, self.enabled, self.total = folder, enabled, total
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._text: TextIO | None = None
        self._board: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS):
            truncate_after(folder / name, step)
        self._text = (folder / TEXT).open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # steps from here on are written anew; TensorBoard hides what came before them
            self._board = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def note(self, text: str, *, style: str | None = None) -> None:
        """Print one line and keep it in ``out.log``."""
        if not self.enabled:
            return
        self._console.print(text, style=style, markup=False)
        self._keep(text)

    def warn(self, text: str) -> None:
        """Print a line that must not be overlooked."""
        self.note(f"WARNING: {text}", style="bold yellow")

    def header(self, title: str, rows: Mapping[str, str]) -> None:
        """Print what is about to run, as a table of names and values."""
        if not self.enabled:
            return
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
            self._keep(f"{name}: {value}")
        self._console.print(table)

    def step(self, values: Mapping[str, float | int]) -> None:
        """Record one logged step; ``values`` holds ``step``, ``loss`` and the rest."""
        if not self.enabled:
            return
        append(self.folder / METRICS, values)
        self._write_board("train", values)
        line = progress_line(values, self.total)
        self._keep(line)
        if self._console.is_terminal:
            self._show(int(values["step"]), line)
        else:
            self._console.print(line, markup=False)

    def evaluation(self, step: int, results: Mapping[str, float], time_s: float) -> None:
        """Record and print the results of one evaluation."""
        if not self.enabled:
            return
        append(self.folder / EVALUATIONS, {"step": step, **results})
        self._write_board("eval", {"step": step, **results})
        for name, value in results.items():
            self._keep(f"step {step} {name} {metric_text(name, value)}")
        title = f"evaluation at step {step} ({time_s:.1f} s)"
        self._console.print(metrics_table(results, title))

    def pause(self) -> None:
        """Take the progress line off the screen, for another bar; the next step brings it back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        """Take the progress line off the screen and close the files."""
        self.pause()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._text is not None:
            self._text.close()
            self._text = None

    def _show(self, step: int, line: str) -> None:
        if self._bar is None:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._bar.add_task("", total=self.total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=escape(line))

    def _keep(self, text: str) -> None:
        if self._text is not None:
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._text.flush()

    def _write_board(self, prefix: str, values: Mapping[str, float | int]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"{prefix}/{name}", value, int(values["step"]))
            self._board.flush()


class Meter:
    """Rates over the steps since the last logged one."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._num_steps, self._data_wait_s = 0, 0.0

    def add(self, data_wait_s: float) -> None:
        """Count a step that waited so long for its data."""
        self._num_steps += 1
        self._data_wait_s += data_wait_s

    def leave_out(self, time_s: float) -> None:
        """Do not count time that was spent on something else than steps."""
        self._start += time_s

    def rates(self, samples_per_step: int) -> dict[str, float]:
        """Means over the interval; the next interval begins."""
        time_s, steps = time.perf_counter() - self._start, max(1, self._num_steps)
        rates = {
            "samples_per_second": steps * samples_per_step / time_s,
            "data_wait_pct": 100 * self._data_wait_s / time_s,
            "step_time_ms": 1000 * time_s / steps,
        }
        self.__init__()  # type: ignore[misc]
        return rates


def progress_line(values: Mapping[str, float | int], total: int) -> str:
    """One step in one line: loss and its terms, scale, rates, and the time that is left."""
    eta_s = (total - values["step"]) * values["step_time_ms"] / 1000
    terms = [name for name in values if name.startswith("loss/")]
    parts = [f"step {values['step']}/{total}", f"loss {values['loss']:.4f}"]
    parts += [f"{name.removeprefix('loss/')} {values[name]:.4f}" for name in terms]
    parts += [f"scale {values['scale']:.2f}", f"lr {values['lr']:.2e}"]
    parts += [f"{values['samples_per_second']:.0f} samples/s"]
    parts += [f"data {values['data_wait_pct']:.1f}%", f"eta {duration(eta_s)}"]
    if values["num_skipped"]:
        parts.append(f"skipped {values['num_skipped']}")
    return "  ".join(parts)


def metric_text(name: str, value: float) -> str:
    """A metric as people read it: ranks, counts and a probe's C as they are, shares in percent."""
    if name.endswith(("-classes", "probe-C")):
        return f"{value:g}"
    return f"{value:.1f}" if name.endswith("_rank") else f"{100 * value:.1f} %"


def metrics_table(results: Mapping[str, float], title: str) -> Table:
    """One row a metric, by the set it was measured on."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("set", "metric"):
        table.add_column(column)
    table.add_column("value", justify="right")
    for name, value in results.items():
        where, _, metric = name.partition("/")
        table.add_row(where, metric, metric_text(name, value))
    if any("/1caption/" in name for name in results):
        table.caption = "1caption: with the first caption of each image only"
    return table


def duration(seconds: float) -> str:
    """Seconds as ``1d 02:03:04``, without the days when there are none."""
    if not math.isfinite(seconds):
        return "--:--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"


def append(path: Path, values: Mapping[str, float | int]) -> None:
    """Add one JSON line; what is not finite becomes null, since JSON has no word for it."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(plain, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; [] if there is none, without a line that was cut off."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def truncate_after(path: Path, step: int) -> None:
    """Remove the records of later steps; the file is replaced as a whole."""
    if not path.exists():
        return
    kept = [json.dumps(record) for record in read(path) if record["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
