# SPDX-License-Identifier: Apache-2.0
"""A whole training step and its phases: without a teacher, with one, and in open_clip's loop.

    python benchmarks/bench_step.py [--student ViT-T-16 --teacher ViT-B-16] [--batch 256] ...

The engine's rows run the real thing: ``job.build`` with a configuration, then the loop's
``run_step``. A mode is a configuration (``step_modes.py``) and nothing else; the cached one has
a cache from ``kdengine cache``. open_clip's rows run its ``train_one_epoch`` with the same weights,
loader, batch and optimiser. All take turns; the phases are watched from outside (``timeline.py``)
and must add up to the step, which is timed apart.

Student and teacher have random weights: nothing is learned here. ``--teacher 4x`` is the student
with twice its widths; forward FLOPs and parameters of both are in the rows.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, race, shards, step_modes  # noqa: E402
from benchmarks.step_modes import CACHED, MODES, PLAIN, RELATIONAL, Model, Runner, Values  # noqa: E402
from benchmarks.timeline import PHASES, Timeline  # noqa: E402
from kdengine import assembly, job  # noqa: E402
from kdengine.config import RunConfig, from_dict  # noqa: E402
from kdengine.ranks import Ranks  # noqa: E402

OURS, PEER = "kdengine", "open_clip"

# allowed distance of the phases' sum from the step
TOLERANCE = 0.05
COLUMNS = ["mode", "loop", "samples/s", "step ms", "p20-p80", *PHASES, "sum", "vs no teacher"]
COLUMNS += [f"vs {PEER}"]


def configuration(options: argparse.Namespace, student: Model, batch: int) -> Values:
    """What all modes share."""
    return {
        "data": {
            "train_data": shards.training_shards(options.data, options.scratch),
            "index_dir": str(options.scratch / "index"),
            "workers": options.workers,
            "shuffle_buffer": 1024,
        },
        "model": {"model": f"local-dir:{student.folder}"},
        "optim": {"warmup": 10},
        "train": {
            "batch_size": batch,
            # longer than any benchmark: the learning rate stays near its peak
            "steps": 1_000_000,
            "precision": options.precision,
            "zero_stage": options.zero_stage,
        },
        "run": {"logs": str(options.scratch / "step" / "runs"), "tensorboard": False},
    }


def field(
    options: argparse.Namespace,
    shared: Values,
    student: Model,
    teacher: Model,
    me: Ranks,
    timelines: dict[tuple, Timeline],
) -> dict[tuple[str, str], Callable[[], Runner]]:
    """Makers of all contenders, by mode and loop, in the order of the table."""
    found: dict[tuple[str, str], Callable[[], Runner]] = {}

    def add(mode: str, who: str, make: Callable[[RunConfig, Timeline], Runner]) -> None:
        timeline = timelines[mode, who] = Timeline(me.device)

        def build() -> Runner:
            values = step_modes.merged(shared, step_modes.modes(teacher.folder)[mode])
            if mode == CACHED:
                values = step_modes.cached(values, options.scratch)
            name = f"{mode}-{who}".replace(" ", "")
            values = step_modes.merged(values, {"run": {"name": name}})
            return make(from_dict(RunConfig, values, mode), timeline)

        found[mode, who] = build

    def theirs(config: RunConfig, timeline: Timeline) -> Runner:
        from benchmarks.open_clip_loop import Loop

        named = [model.removeprefix("local-dir:") for model, _ in config.distill.teachers()]
        loader = assembly.build_data(config, me, student.spec, None).loader
        return Loop(config, str(student.folder), named, loader, me.device, timeline)

    for mode in options.modes:
        add(mode, OURS, lambda config, timeline: step_modes.Engine(config, me, timeline))
        if mode in (PLAIN, RELATIONAL):
            add(mode, PEER, theirs)
    return found


def take_turns(
    runners: dict[tuple[str, str], Runner],
    timelines: dict[tuple, Timeline],
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[dict[tuple, list[dict[str, float]]], dict[tuple, list[float]], dict[tuple, str]]:
    """Phases of the steps of each contender, the mean step of each of its turns, who failed.

    The first step of a turn, for which batches lie ready and caches are cold, does not count; nor
    does the first round. One that raises (a batch too large for the GPU) is closed and left out.
    """
    phases: dict[tuple, list[dict[str, float]]] = {key: [] for key in runners}
    times: dict[tuple, list[float]] = {key: [] for key in runners}
    failures: dict[tuple, str] = {}
    for number in range(options.rounds + 1):
        for key, runner in list(runners.items()):
            try:
                found, step_ms = take_turn(runner, timelines[key], options.steps, device)
            except Exception as error:
                failures[key] = race.in_one_line(error)
                runners.pop(key).close()
                continue
            if number:
                phases[key] += found
                times[key].append(step_ms)
            # batches that are decoded ahead must not run in the next one's turn
            time.sleep(1e-3 * min(step_ms, 1000.0))
        if failures:
            _free(device)
        print(f"  round {number} of {options.rounds}", flush=True)
    return phases, times, failures


def take_turn(
    runner: Runner, timeline: Timeline, num_steps: int, device: torch.device
) -> tuple[list[dict[str, float]], float]:
    """Phases of so many steps, and the mean time of one by the clock."""
    runner.run(1)
    _wait(device)
    timeline.take()
    start = time.perf_counter()
    runner.run(num_steps)
    _wait(device)
    step_ms = 1e3 * (time.perf_counter() - start) / num_steps
    return timeline.take(), step_ms


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(steps: list[dict[str, float]], times: list[float], batch: int) -> dict[str, Any]:
    """Medians of the phases and of the step, and what share of the step the phases make up."""
    phases = {name: statistics.median(step[name] for step in steps) for name in PHASES}
    each = sorted(sum(step.values()) for step in steps)
    last = len(each) - 1
    sums = statistics.mean(sum(step[name] for name in PHASES) for step in steps)
    step_ms = statistics.median(each)
    return {
        "phases_ms": phases,
        "step": {"median_ms": step_ms, "p20_ms": each[round(0.2 * last)],
                 "p80_ms": each[round(0.8 * last)]},
        "clock_ms": statistics.mean(times),
        "phases_share": sums / statistics.mean(times),
        "samples_per_second": 1e3 * batch / step_ms,
        "num_steps": len(steps),
    }  # fmt: skip


def measure(
    options: argparse.Namespace,
    batch: int,
    student: Model,
    teacher: Model,
    me: Ranks,
    journal: common.Journal,
) -> bool:
    """All contenders at one batch: run, print, write; whether all ran and add up."""
    shared, timelines = configuration(options, student, batch), {}
    identity = {"benchmark": "step", "rows": batch, "dtype": options.precision}
    identity["variant"] = f"{Path(student.name).stem} from {Path(teacher.name).stem}"
    timing = {**identity, "case": "timing", "backend": ""}
    first = {**identity, "case": options.modes[0], "backend": OURS}
    if journal.has(first) or journal.has(timing):
        return True
    where = common.machine(me.device) | {"deepspeed": common.version("deepspeed")}
    runners, reasons = {}, {}
    for key, make in field(options, shared, student, teacher, me, timelines).items():
        own = {**identity, "case": key[0], "backend": key[1]}
        try:
            runners[key] = make()
        except Exception as error:
            reasons[key] = race.in_one_line(error)
            journal.add(own, reason=reasons[key], **where)
    journal.start(timing)
    phases, times, failures = take_turns(runners, timelines, options, me.device)
    for key, reason in failures.items():
        journal.add({**identity, "case": key[0], "backend": key[1]}, reason=reason, **where)
    reasons |= failures
    rows = {key: summarise(phases[key], times[key], batch) for key in runners}
    for key, row in rows.items():
        for name, other in (("no_teacher", (PLAIN, OURS)), (PEER, (key[0], PEER))):
            if other in rows:
                row[f"time_vs_{name}"] = row["step"]["median_ms"] / rows[other]["step"]["median_ms"]
        if abs(row["phases_share"] - 1) > TOLERANCE:
            reasons[key] = f"the phases make up {row['phases_share']:.0%} of the step"
        about = {f"{who}_{what}": getattr(model, what) for what in ("flops", "parameters")
                 for who, model in (("student", student), ("teacher", teacher))}  # fmt: skip
        case = {"case": key[0], "backend": key[1], "zero_stage": options.zero_stage}
        case["data"] = Path(shared["data"]["train_data"]).name
        journal.add({**identity, **case}, **row, **about, warning=reasons.get(key), **where)
    ratio = teacher.flops / student.flops
    title = f"{identity['variant']} ({ratio:.1f} times the forward FLOPs), batch {batch}, "
    title += f"{options.precision}: {where['device']}"
    common.show(title, COLUMNS, [cells(key, row) for key, row in rows.items()])
    for (mode, who), reason in reasons.items():
        print(f"  {mode}, {who}: {reason}", flush=True)
    for runner in runners.values():
        runner.close()
    # engines refer to themselves: without this the next batch would find their memory taken
    runners.clear()
    _free(me.device)
    return not any(who == OURS for _, who in reasons)


def cells(key: tuple[str, str], row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    step = row["step"]
    ratios = (row.get(f"time_vs_{name}") for name in ("no_teacher", PEER))
    return [
        *key,
        f"{row['samples_per_second']:.0f}",
        f"{step['median_ms']:.1f}",
        f"{step['p20_ms']:.1f}-{step['p80_ms']:.1f}",
        *(f"{row['phases_ms'][name]:.1f}" for name in PHASES),
        f"{row['phases_share']:.0%}",
        *(f"{ratio:.2f}" if ratio else "" for ratio in ratios),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="ViT-T-16" if on_gpu else "ViT-Nano-64")
    parser.add_argument("--teacher", default="ViT-B-16" if on_gpu else "4x",
                        help="a name, a JSON file, or 4x: the student, twice as wide")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE",
                        help=f"of {', '.join(map(repr, MODES))}")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024] if on_gpu else [64])
    parser.add_argument("--precision", choices=["fp32", "amp_bf16", "bf16"],
                        default="amp_bf16" if on_gpu else "fp32")  # fmt: skip
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=0,
                        help="one process has nothing to shard")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 6, help="a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that count")
    parser.add_argument("--data", help="shards; without, Flickr8k or rendered scenes")
    parser.add_argument("--workers", type=int, default=8 if on_gpu else 1, help="decoding threads")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--scratch", type=Path, default=shards.SCRATCH,
                        help="for index, scenes, models")  # fmt: skip
    parser.add_argument("--json", help="append one JSON line a row to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")
    options = parser.parse_args(arguments)
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1; {getattr(options, name)} came")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.scratch = options.scratch.resolve()
    folder = options.scratch / "step"
    teacher = (
        step_modes.widened(options.student, folder) if options.teacher == "4x" else options.teacher
    )
    names = {"student": options.student, "teacher": teacher}
    # a cache belongs to its teacher: another one has another folder
    models = [Model(name, folder / f"{role}-{Path(name).stem}") for role, name in names.items()]
    for model in models:
        print(f"{model.name}: {model.parameters / 1e6:.1f} M parameters, "
              f"{model.flops / 1e9:.3g} GFLOP forward a pair", flush=True)  # fmt: skip
    journal = common.Journal(options.json, resume=options.resume)
    me = job.start_ranks(RunConfig())
    torch.set_num_threads(options.threads)
    right = [measure(options, batch, models[0], models[1], me, journal) for batch in options.batch]
    return 0 if all(right) else race.WRONG


if __name__ == "__main__":
    code = common.command(main)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
