# SPDX-License-Identifier: Apache-2.0
"""Time of nearest centroids and of a range-join: this engine against torch and faiss.

    python benchmarks/bench_assign.py [--rows 16384] [--keys 4096] [--width 256 1280] [--json FILE]

Unit rows around random centres. Cases: ``nearest`` and ``top 8`` of the keys, and the ``pairs``
among as many rows as there are keys, closer than what one in a thousand pairs is. Backends:
``torch`` and ``triton`` (``kdengine.ops``), ``eager`` (the matrix whole, in float32, then max, topk
or a comparison) and ``faiss`` (IndexFlat on the CPU, exact search of its own product; only on the
CPU). The answers of the first rows are compared with float64 before a time is printed: ours must
agree in every one, others are told by the share that agrees. ``of floor`` is one product of the
same size by ``torch.mm``; half of it for pairs, each of which is counted once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, floors, race  # noqa: E402
from kdengine import ops, reference_assign  # noqa: E402
from kdengine.ops import _backend  # noqa: E402

COLUMNS = ["backend", "case", "ms", "p20-p80", "of floor", "peak MiB", "vs eager", "agreement"]
CASES = {"nearest": 1, "top 8": 8, "pairs": 0}
# rows whose answers are compared
CHECKED = 64
Answer = Callable[[], Any]


def make_rows(rows: int, keys: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows around half as many centres as there are keys, and keys around them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, keys // 2), width, generator=generator)

    def around(count: int) -> Tensor:
        own = centres[torch.randint(len(centres), (count,), generator=generator)]
        noise = torch.randn(count, width, generator=generator)
        return F.normalize(own + noise, dim=1).to(device)

    return around(rows), around(keys)


def threshold(key: Tensor) -> float:
    """The distance that about one in a thousand pairs is below."""
    part = key[:2048]
    distances = torch.pdist(part)
    return float(distances.sort().values[len(distances) // 1000])


def contenders(case: str, x: Tensor, key: Tensor, eps: float) -> dict[str, Answer]:
    """Functions that answer the case: (N, count) numbers, or pairs (E, 2) in any order."""
    count = CASES[case]
    found: dict[str, Answer] = {}
    for name in sorted(n for op, n in _backend.MODULES if op == "assign"):
        if name != "torch" and not x.is_cuda:
            continue
        if reason := _backend.why_not("assign", name, [x]):
            print(f"  {name}: {reason}")
        elif count:
            found[name] = lambda name=name: ops.assign(x, key, count=count, backend=name).keys
        else:
            found[name] = lambda name=name: ops.range_join(key, eps=eps, backend=name)
    found["eager"] = lambda: eager(x, key, count, eps)
    if not x.is_cuda and common.version("faiss-cpu"):
        found["faiss"] = lambda: by_faiss(x, key, count, eps)
    return found


def eager(x: Tensor, key: Tensor, count: int, eps: float) -> Tensor:
    """As one would write it in torch, for unit rows."""
    if count == 1:
        return (x @ key.T).argmax(1, keepdim=True)
    if count:
        return (x @ key.T).topk(count, 1).indices
    return (2 - 2 * (key @ key.T) < eps**2).triu(1).nonzero()


def by_faiss(x: Tensor, key: Tensor, count: int, eps: float) -> Tensor:
    """The exact index of faiss; its pairs come with both orders and each row's own."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if count:
        index = faiss.IndexFlatIP(key.shape[1])
        index.add(key.numpy())
        return torch.from_numpy(index.search(x.numpy(), count)[1])
    index = faiss.IndexFlatL2(key.shape[1])
    index.add(key.numpy())
    limits, _, others = index.range_search(key.numpy(), eps**2)
    counts = torch.from_numpy(limits.astype("int64")).diff()
    pairs = torch.stack(
        [torch.arange(len(key)).repeat_interleave(counts), torch.from_numpy(others)], 1
    )
    return pairs[pairs[:, 0] < pairs[:, 1]]


def agreement(case: str, answer: Tensor, x: Tensor, key: Tensor, eps: float) -> float:
    """The share of the first rows' answers that are those of float64."""
    if count := CASES[case]:
        some = x[:CHECKED].double()
        truth = torch.cat([_nearest(row, key, count) for row in some.split(1)])
        return float((answer[: len(some)] == truth).double().mean())
    some = key[:CHECKED].double()
    distances = torch.cdist(some, key.double(), compute_mode="donot_use_mm_for_euclid_dist")
    near = (distances < eps).triu(1).nonzero()
    mine = answer[answer[:, 0] < CHECKED]
    both = set(map(tuple, near.tolist())) & set(map(tuple, mine.tolist()))
    return len(both) / max(1, len(near), len(mine))


def _nearest(row: Tensor, key: Tensor, count: int) -> Tensor:
    return reference_assign.nearest(row, key.double(), count)[0]


def run_size(size: tuple[int, int, int], options: Any, journal: common.Journal) -> bool:
    """Measure, print and write one size (rows, keys, width); whether all of ours are right."""
    device = torch.device(options.device)
    x, key = make_rows(*size, device)
    x, key = (t.to(getattr(torch, options.dtype)) for t in (x, key))
    eps, where, right, shown = threshold(key.float()), common.machine(device), True, []
    rows, keys, width = size
    print(f"assign {rows} x {keys} x {width}, {options.dtype}", flush=True)
    for case in CASES:
        identity = {"benchmark": "assign", "case": case, "rows": rows, "size": keys}
        identity |= {"width": width, "dtype": options.dtype}
        field = contenders(case, x, key, eps)
        if all(journal.has({**identity, "backend": name}) for name in field):
            continue
        journal.start({**identity, "backend": "timing"})
        agreed = {name: agreement(case, run(), x, key, eps) for name, run in field.items()}
        wrong = [n for n in field if n in ("torch", "triton") and agreed[n] < 1]
        for name in wrong:
            right = False
            reason = f"wrong: {agreed[name]:.1%} of the answers are those of float64"
            journal.add({**identity, "backend": name}, reason=reason, **where)
            print(f"  no time for {name}, {case}: {reason}", flush=True)
            del field[name]
        times = common.time_interleaved(field, device, options.seconds, options.clock)
        height = rows if CASES[case] else keys
        floor = floors.product_ms(height, width, x.dtype, device, keys, options.clock)
        floor /= 1 if CASES[case] else 2
        for name, run in field.items():
            peak = common.peak_bytes(run, device) / common.MIB if name != "faiss" else None
            row = {
                "time": times[name]._asdict(),
                "floor_ms": floor,
                "share_minimum": floor / times[name].median_ms,
                "peak_mib": peak and round(peak, 2),
                "time_vs_eager": times[name].median_ms / times["eager"].median_ms,
                "agreement": agreed[name],
                "clock": options.clock,
            }
            journal.add({**identity, "backend": name}, **row, **where)
            shown.append(cells(name, case, row))
    common.show(where["device"], COLUMNS, shown)
    journal.rest()
    return right


def cells(name: str, case: str, row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    time = row["time"]
    return [
        name,
        case,
        f"{time['median_ms']:.2f}",
        f"{time['p20_ms']:.2f}-{time['p80_ms']:.2f}",
        f"{row['share_minimum']:.0%}",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
        f"{row['time_vs_eager']:.2f}",
        f"{row['agreement']:.2%}",
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=65536 if on_gpu else 8192)
    parser.add_argument("--keys", type=int, nargs="+", default=[65536] if on_gpu else [4096])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1280])
    common.add_timing_options(parser, on_gpu)
    common.add_clock_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    journal = common.Journal(options.json, resume=options.resume)
    sizes = [(options.rows, keys, width) for keys in options.keys for width in options.width]
    right = [run_size(size, options, journal) for size in sizes]
    return 0 if all(right) else race.WRONG


if __name__ == "__main__":
    sys.exit(main())
