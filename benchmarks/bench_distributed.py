# SPDX-License-Identifier: Apache-2.0
"""What a loss over several ranks costs a rank: bytes, FLOPs, and time that nothing hides.

    python benchmarks/bench_distributed.py [--json FILE] [--cases count emulation exposed model]

* ``count``: bytes sent and FLOPs of products, counted at the calls, against open_clip's losses with
  ``local_loss`` and ``gather_with_grad``; CLIP-KD's relational losses against the same each on its
  own; GD against all rows on every rank. Real gloo ranks on the CPU, gradients compared first.
* ``emulation``: a rank's share alone, b x N, with an exchange that copies its own rows in place of
  the others'. No communication: it is the compute side, with its blocks and chunks.
* ``exposed``: real ranks, one a GPU over NCCL; the time of a loss less that of its emulation. On a
  CPU two gloo ranks, which share its cores: a trial, not a measurement.
* ``model``: time of the loss up to 4096 ranks at a fixed batch, from the emulation's rates and
  stated links; ``distributed_model.py`` has the assumptions, ``--plot`` draws it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, distributed_model, floors, problems, race  # noqa: E402
from benchmarks.rank_work import (  # noqa: E402
    COUNTED,
    OBJECTIVES,
    Alone,
    count,
    engine,
    expose,
    in_ranks,
    inputs_of,
    variant,
)

CASES = ("count", "emulation", "exposed", "model")
# of the other's, at so many ranks
TARGET_RANKS = 8
TARGETS = {
    "InfoNCE": {"bytes": 0.55, "flops": 0.68},
    "InfoNCE+CRD": {"bytes": 0.55, "flops": 0.76},
    "CLIP-KD": {"bytes": 0.81},
    "GD": {"flops": 0.126},
}
# gradients of both must agree so far, relative
AGREES = {"float32": 1e-5, "bfloat16": 3e-2}


def count_all(options: argparse.Namespace, journal: common.Journal) -> bool:
    """Count for every number of ranks and dtype; whether gradients agree and targets are met."""
    (rows, width), right, shown = options.counted, True, []
    for dtype in AGREES:
        for size in options.sizes:
            base = {"benchmark": "distributed", "case": "count", "dtype": dtype, "size": size}
            base |= {"rows": rows, "width": width}
            if journal.has({**base, "objective": COUNTED[-1], "backend": "kdengine"}):
                continue
            own = {"dtype": dtype, "device": "cpu", "rows": [rows], "width": width}
            own = argparse.Namespace(**vars(options) | own)
            found = in_ranks(count, size, own)
            for ours, theirs in zip(found[::2], found[1::2], strict=True):
                for name in ("bytes", "flops"):
                    ours[f"{name}_ratio"] = ours[name] / theirs[name]
                targets = TARGETS[ours["objective"]] if size == TARGET_RANKS else {}
                met = all(ours[f"{k}_ratio"] <= limit for k, limit in targets.items())
                agrees = ours["difference"] <= AGREES[dtype]
                right &= met and agrees
                if not (met and agrees):
                    ours["reason"] = "a target is missed" if agrees else "wrong: gradients differ"
                for row in (ours, theirs):
                    journal.add({**base, **row}, **common.machine(torch.device("cpu")))
                place = f"{dtype} W = {size}", theirs["backend"]
                shown.append([ours["objective"], *place, *cells(ours, theirs)])
    columns = ["objective", "ranks", "other", "KiB sent", "other", "ratio", "units", "other"]
    columns += ["ratio", "gradients differ by"]
    common.show("counted a rank, forward and backward", columns, shown)
    return right


def cells(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Both sides of a count, and their ratios."""
    return [
        *(f"{row['bytes'] / 1024:,.1f}" for row in (ours, theirs)),
        f"{ours['bytes_ratio']:.3f}",
        *(f"{row['units']:.2f}" for row in (ours, theirs)),
        f"{ours['flops_ratio']:.3f}",
        f"{ours['difference']:.0e}",
    ]


def emulate_all(options: argparse.Namespace, journal: common.Journal) -> bool:
    """Time a rank's share for every number of ranks, batch and number of chunks."""
    device, shown = torch.device(options.device), []
    for objective in OBJECTIVES:
        for b in options.rows:
            for size in options.emulated:
                x = inputs_of(options, objective, b, 0)
                base = {"benchmark": "distributed", "case": "emulation", "objective": objective}
                base |= {"rows": b, "width": options.width, "dtype": options.dtype, "size": size}
                if journal.has({**base, "backend": "kdengine", "variant": variant(None)}):
                    continue
                works = {
                    variant(n): functools.partial(
                        engine, x, objective, options.backend, Alone(size, n)
                    )
                    for n in options.chunks
                }
                journal.start({**base, "backend": "timing"})
                spreads = common.time_interleaved(works, device, options.seconds)
                unit_ms = floors.product_ms(b, options.width, x["image"].dtype, device, b * size)
                units = problems.OBJECTIVES[objective].units
                for name, spread in spreads.items():
                    share = units * unit_ms / spread.median_ms
                    values = {"loss_ms": spread.median_ms, "p20_ms": spread.p20_ms}
                    values |= {"p80_ms": spread.p80_ms, "unit_ms": unit_ms, "share_minimum": share}
                    values |= {"computed_by": options.backend}
                    row = {**base, "backend": "kdengine", "variant": name}
                    journal.add(row, **values, emulation=True, **common.machine(device))
                    place = f"b = {b:,}, W = {size}, N = {b * size:,}"
                    times = [f"{spread.median_ms:.3f}", f"{share:.0%}"]
                    shown.append([objective, place, name, *times])
    columns = ["objective", "one rank's share", "variant", "fwd+bwd ms", "of floor"]
    common.show("emulation on one device, no communication", columns, shown)
    return True


def expose_all(options: argparse.Namespace, journal: common.Journal) -> bool:
    """Time what communication adds, over as many ranks as there are GPUs."""
    count = torch.cuda.device_count() if options.device == "cuda" else 2
    if count < 2:
        print("exposed: needs several GPUs; one is here; skipped")
        return True
    base = {"benchmark": "distributed", "case": "exposed", "size": count}
    base |= {"width": options.width, "dtype": options.dtype}
    shown = []
    for row in in_ranks(expose, count, options):
        journal.add({**base, **row}, **common.machine(torch.device(options.device)))
        times = [f"{row[k]:.3f}" for k in ("loss_ms", "compute_ms", "exposed_ms")]
        shown.append(
            [row["objective"], f"b = {row['rows']:,}, W = {count}", row["variant"], *times]
        )
    columns = ["objective", "ranks", "variant", "loss ms", "compute ms", "exposed ms"]
    common.show("communication that nothing hides", columns, shown)
    return True


def model_all(options: argparse.Namespace, journal: common.Journal) -> bool:
    """The model from the emulations of the same file."""
    if not options.json:
        print("model: needs --json, a file with rows of the emulation; skipped")
        return True
    measured = [json.loads(x) for x in Path(options.json).read_text().splitlines()]
    link, total, towers = distributed_model.Link(), options.total, distributed_model.TOWERS_US
    rows = distributed_model.model(measured, total, towers, link)
    if not rows:
        print("model: no rows of an emulation in the file; skipped")
        return True
    title = distributed_model.assumptions(rows, total, towers, link)
    for row in rows:
        journal.add({"benchmark": "distributed", **row}, assumptions=title)
    columns = ["objective", "backend", "ranks", "b", "loss ms", "exposed ms", "step ms"]
    keys = ("loss_ms", "exposed_ms", "step_ms")
    shown = [
        [r["objective"], r["backend"], f"{r['size']:,}", f"{r['rows']:,}"]
        + [f"{r[k]:,.2f}" for k in keys]
        for r in rows
    ]
    common.show(f"model: {title}", columns, shown)
    if options.plot:
        distributed_model.draw(rows, title, options.plot)
    return True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], help="ranks to count")
    emulated = [8, 64, 512] if on_gpu else [8]
    parser.add_argument("--emulated", type=int, nargs="+", default=emulated, help="their ranks")
    batches = [1024, 4096] if on_gpu else [64]
    parser.add_argument("--rows", type=int, nargs="+", default=batches, help="of one rank, b")
    parser.add_argument("--counted", type=int, nargs=2, default=[512, 512], metavar=("B", "D"))
    parser.add_argument("--width", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="0: default")
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[not on_gpu])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--backend", default="triton" if on_gpu else "auto", help="of the losses")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a share, about")
    parser.add_argument("--repeats", type=int, default=10, help="of a loss over real ranks")
    parser.add_argument("--total", type=int, default=1 << 20, help="global batch of the model")
    parser.add_argument("--plot", type=Path, help="where to draw the model, PNG or SVG")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.chunks = [n or None for n in options.chunks]
    torch.set_num_threads(options.threads)
    journal = common.Journal(options.json, resume=options.resume)
    works = dict(zip(CASES, (count_all, emulate_all, expose_all, model_all), strict=True))
    right = [works[case](options, journal) for case in CASES if case in options.cases]
    journal.rest()
    return 0 if all(right) else race.WRONG


if __name__ == "__main__":
    sys.exit(common.command(lambda: main()))
