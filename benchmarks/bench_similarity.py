# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the relational losses: this engine against dense losses and its peers.

    python benchmarks/bench_similarity.py [--json FILE] [--budget-s 300]
    python benchmarks/bench_similarity.py --rows 1024 4096 [--width 512] [--scale 14.3] ...

Without ``--rows`` a GPU runs the list of ``problems.gpu_plan``, most important first, until the
budget is spent. Backends of the tables: ``torch`` and ``triton`` (``kdengine.losses``; with a
teacher also ``triton G1`` and ``triton G2``, its strips in one phase and in two), ``eager``
and ``compiled`` (the dense loss of ``problems.dense_loss``), ``oracle`` (``kdengine.reference``,
on a CPU), ``open_clip`` (its ClipLoss and DistillClipLoss) and the peers of ``peers.py`` that can
be imported. Each makes the objective's value and the gradients of image, text and scale, of the
same tensors; every one is compared with float64 first, and one that is wrong gets a reason in
place of a time.
"""

import argparse
import contextlib
import functools
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, floors, peers, problems, race  # noqa: E402
from benchmarks.problems import OBJECTIVES, Inputs, Problem  # noqa: E402
from benchmarks.race import Contender, Timed  # noqa: E402
from kdengine import losses, reference  # noqa: E402
from kdengine.ops import _backend  # noqa: E402

# products of a dense loss, one a matrix forward and two of each learned one backward
DENSE_UNITS = {"InfoNCE": 3, "InfoNCE+CRD": 4, "CRD": 4, "CLIP-KD": 8, "CLIP-KD raw": 8}
# from here on only what stores no matrix, and no strips in float32 by the library
HUGE_ROWS = 100_000
# a problem is not started with less time than this
LEAST_S = 15.0
COLUMNS = ["backend", "fwd ms", "fwd+bwd ms", "p20-p80", "of floor", "executed", "TFLOP/s"]
COLUMNS += ["peak MiB", "time vs eager", "vs compiled", "gradient error"]


def ours(problem: Problem, x: Inputs) -> list[Contender]:
    """The backends that can run here; those of the interpreter are not for timing."""
    objective = OBJECTIVES[problem.objective]
    found = []
    for name in sorted(n for op, n in _backend.MODULES if op == "similarity"):
        too_slow = name == "torch" and problem.rows >= HUGE_ROWS
        if too_slow or (name != "torch" and x["image"].device.type != "cuda"):
            continue
        reason = _backend.why_not("similarity", name, [x["image"]])
        if reason:
            print(f"  {name}: {reason}")
            continue

        def loss(backend: str = name) -> Tensor:
            return problems.engine_loss(losses, x, objective, backend=backend)

        own = Contender(name, loss, problems.learned(problem, x), True, objective.units)
        found.append(own)
        if name == "triton" and objective.soft:
            # what fills ``tuning.VARIANTS``
            for variant in ("G1", "G2"):
                using = functools.partial(strips_by, variant)
                found.append(own._replace(name=f"{name} {variant}", using=using))
    return found


@contextlib.contextmanager
def strips_by(variant: str) -> Iterator[None]:
    """Gradients with a teacher in one phase, G1, or in two, G2, whatever the table says."""
    kernels = importlib.import_module("kdengine_kernels.similarity")
    chosen = kernels.two_phase
    setattr(kernels, "two_phase", lambda *_: variant == "G2")  # noqa: B010
    try:
        yield
    finally:
        setattr(kernels, "two_phase", chosen)  # noqa: B010


def dense(problem: Problem, x: Inputs, with_compile: bool) -> list[Contender]:
    """The dense loss, eager and compiled."""
    objective, learned = OBJECTIVES[problem.objective], problems.learned(problem, x)

    def contender(name: str, function: Callable[..., Tensor]) -> Contender:
        units = DENSE_UNITS[problem.objective]
        return Contender(name, lambda: function(x, objective), learned, units=units)

    found = [contender("eager", problems.dense_loss)]
    if x["image"].device.type != "cuda":
        found.append(contender("oracle", functools.partial(problems.engine_loss, reference)))
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(problems.dense_loss, dynamic=False)
        found.append(contender("compiled", compiled))
    return found


def others(problem: Problem, x: Inputs, with_compile: bool) -> list[Contender]:
    """open_clip, and the peers that can do the objective."""
    fields = {"ours": [p for p in peers.PEERS if p.huge], "main": [], "all": peers.PEERS}
    on_gpu = x["image"].device.type == "cuda"
    low = problem.dtype == torch.bfloat16
    wanted = list(fields[problem.field]) if on_gpu and low else []
    found = []
    public = [] if problem.field == "ours" else peers.open_clip_peers(with_compile)
    for peer in [*public, *wanted]:
        if problem.objective not in peer.objectives or peers.importable(peer.modules):
            continue
        learned = problems.learned(problem, x)
        if not peer.learns_scale:
            del learned["scale"]
        # a soft cross-entropy is a constant above the divergence
        same_value = peer not in public or not OBJECTIVES[problem.objective].soft
        units = peer.units[peer.objectives.index(problem.objective)]

        def loss(adapter: peers.Adapter = peer.loss) -> Tensor:
            return adapter(problem, x)

        form = Contender(peer.name, loss, learned, False, units, peer.has_forward, same_value)
        found.append(form)
    return found


def run_problem(
    problem: Problem, options: argparse.Namespace, device: torch.device, journal: common.Journal
) -> bool:
    """Measure, print and write one problem; whether all of ours are right."""
    identity = problem.identity
    if journal.has({**identity, "backend": "timing"}) or journal.has_times(identity):
        return True
    kind = f"{problem.rows} x {problem.width}, scale {problem.scale:g}, {identity['dtype']}"
    print(f"{problem.objective} {kind}", flush=True)
    journal.start({**identity, "backend": "timing"})
    where = common.machine(device)
    inputs = problems.make_inputs(problem, device)
    truth = problems.make_truth(problem, inputs)
    with_compile = problem.compiled or options.compile
    contenders = [*ours(problem, inputs), *others(problem, inputs, with_compile)]
    if problem.field != "ours":
        contenders += dense(problem, inputs, with_compile)
    if options.backends:
        contenders = [c for c in contenders if c.name in options.backends]
    shown, reasons = race.race(
        identity, contenders, truth, journal, device, problem.dtype, options.seconds, where
    )
    if shown:
        unit_ms = floors.product_ms(problem.rows, problem.width, problem.dtype, device)
        where |= common.gpu_state() if device.type == "cuda" else {}
        rows = {c.name: describe(problem, c, shown, unit_ms) for c in contenders if c.name in shown}
        for name, row in rows.items():
            journal.add({**identity, "backend": name}, **row, truth=truth.source, **where)
        title = f"{where['device']}, {problem.objective} {kind}, U = {unit_ms:.3g} ms"
        common.show(title, COLUMNS, [cells(name, row) for name, row in rows.items()])
    for name, reason in reasons.items():
        print(f"  no time for {name}: {reason}", flush=True)
    if device.type == "cuda" and problem.rows <= race.GRAPH_ROWS:
        graphs(problem, [c for c in contenders if c.name in shown], options, device, journal, where)
    journal.rest()
    return not any(c.ours and c.name in reasons for c in contenders)


def describe(
    problem: Problem, contender: Contender, timed: dict[str, Timed], unit_ms: float
) -> dict[str, Any]:
    """The row of one contender: its own numbers, and its ratios within this run."""
    own = timed[contender.name]
    both, minimum = own.both.median_ms, OBJECTIVES[problem.objective].units
    row: dict[str, Any] = {
        "forward": own.forward and own.forward._asdict(),
        "forward_backward": own.both._asdict(),
        "unit_ms": unit_ms,
        "minimum_units": minimum,
        "executed_units": contender.units,
        "share_minimum": minimum * unit_ms / both,
        "share_executed": contender.units and contender.units * unit_ms / both,
        "tflops": minimum * 2e-9 * problem.rows**2 * problem.width / both,
        "peak_mib": round(own.peak_mib, 2),
        "errors": own.errors,
    }
    for name in ("eager", "compiled"):
        if name in timed:
            row[f"time_vs_{name}"] = both / timed[name].both.median_ms
            row[f"memory_vs_{name}"] = own.peak_mib / max(timed[name].peak_mib, 1e-9)
    return row


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""

    def ratio(key: str, form: str = ".2f") -> str:
        return f"{row[key]:{form}}" if row.get(key) is not None else ""

    both = row["forward_backward"]
    worst = max(x for key, x in row["errors"].items() if key != "loss")
    return [
        name,
        f"{row['forward']['median_ms']:.2f}" if row["forward"] else "",
        f"{both['median_ms']:.2f}",
        f"{both['p20_ms']:.2f}-{both['p80_ms']:.2f}",
        ratio("share_minimum", ".0%"),
        ratio("share_executed", ".0%"),
        ratio("tflops", ".3g"),
        f"{row['peak_mib']:.1f}",
        ratio("time_vs_eager"),
        ratio("time_vs_compiled"),
        f"{worst:.0e}",
    ]


def graphs(
    problem: Problem,
    contenders: list[Contender],
    options: argparse.Namespace,
    device: torch.device,
    journal: common.Journal,
    where: dict[str, Any],
) -> None:
    """Rows of replayed CUDA graphs, ours and the dense loss's: a failed capture costs only them."""
    for contender in contenders:
        identity = {**problem.identity, "backend": f"{contender.name} graph"}
        if not (contender.ours or contender.name == "eager") or journal.has(identity):
            continue
        journal.start(identity)
        try:
            spread = race.time_graph(contender, device, options.seconds / 4)
        except Exception as error:
            journal.add(identity, reason=race.in_one_line(error), **where)
            print(f"  no time for {identity['backend']}: {race.in_one_line(error)}", flush=True)
            if common.is_device_lost():
                sys.exit(race.DEVICE_LOST)
            continue
        journal.add(identity, forward_backward=spread._asdict(), **where)
        print(f"  {identity['backend']}: {spread.median_ms:.3f} ms", flush=True)


def plan(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    """The problems asked for."""
    if device.type == "cuda" and not options.rows:
        return problems.gpu_plan()
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, options.dtype) if options.dtype else default
    objectives = options.objective or ["InfoNCE", "InfoNCE+CRD"]
    return [
        Problem(objective, rows, options.width, options.scale, dtype)
        for rows in options.rows or [1024, 4096]
        for objective in objectives
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", help="batches; 1024 and 4096 on a CPU")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scale", type=float, default=14.3)
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a problem, about")
    parser.add_argument("--budget-s", type=float, default=300.0, help="stop cleanly after this")
    parser.add_argument("--backends", nargs="+", help="only these, by their names in the tables")
    parser.add_argument("--compile", action="store_true", help="always time torch.compile too")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    end = time.perf_counter() + options.budget_s
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    journal = common.Journal(options.json, resume=options.resume)
    if device.type == "cuda":
        print(f"a product of 8192 in every direction: {floors.peak_tflops(device):.0f} TFLOP/s")
        for peer in peers.PEERS:
            if reason := peers.importable(peer.modules):
                print(f"left out: {peer.name} ({reason})")
    all_right = True
    for problem in plan(options, device):
        if end - time.perf_counter() < LEAST_S:
            print("the time is up: the remaining problems are left out")
            break
        try:
            all_right &= run_problem(problem, options, device, journal)
        except Exception as error:
            all_right = False
            traceback.print_exc()
            reason = race.in_one_line(error)
            journal.add({**problem.identity, "backend": "timing"}, reason=reason)
            if common.is_device_lost():
                return race.DEVICE_LOST
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0 if all_right else race.WRONG


if __name__ == "__main__":
    sys.exit(main())
