# SPDX-License-Identifier: Apache-2.0
"""Time of feature distillation, normalise and squared error: this engine against torch.

    python benchmarks/bench_feature.py [--rows 32768] [--width 512 1024] [--json FILE]

One modality, forward and backward. Backends: ours (``torch``, ``triton``, ``cuda``), and ``torch``
``eager`` and ``compiled`` (``F.normalize`` and ``F.mse_loss`` in float32). Compared with float64
first. The share is that of a memory copy measured in the same run: the least traffic is both
inputs forward, and both inputs and the gradient backward, 5 B E elements.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, floors, race  # noqa: E402
from benchmarks.race import Contender, Truth  # noqa: E402
from kdengine import losses, reference  # noqa: E402
from kdengine.ops import _backend  # noqa: E402

COLUMNS = ["backend", "fwd ms", "fwd+bwd ms", "p20-p80", "of bandwidth", "peak MiB"]
COLUMNS += ["time vs eager", "gradient error"]


def dense_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as one would write it in torch."""
    pair = (F.normalize(x.float(), dim=1) for x in (student, teacher))
    return F.mse_loss(*pair)


def contenders(student: Tensor, teacher: Tensor) -> list[Contender]:
    """Our backends, and torch eager and (on a GPU) compiled."""
    learned, found = {"student": student}, []
    for name in sorted(n for op, n in _backend.MODULES if op == "feature"):
        if name == "triton" and not student.is_cuda:
            continue
        reason = _backend.why_not("feature", name, [student])
        if reason:
            print(f"  {name}: {reason}")
            continue

        def loss(backend: str = name) -> Tensor:
            return losses.feature(student, teacher, normalize=True, backend=backend)

        found.append(Contender(name, loss, learned, ours=True))
    found.append(Contender("eager", lambda: dense_loss(student, teacher), learned))
    if student.is_cuda:
        torch.compiler.reset()
        compiled = torch.compile(dense_loss, dynamic=False)
        found.append(Contender("compiled", lambda: compiled(student, teacher), learned))
    return found


def run_size(size: tuple[int, int], options: argparse.Namespace, journal: common.Journal) -> bool:
    """Measure, print and write one size (rows, width); whether all of ours are right."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    identity = {"benchmark": "feature", "rows": size[0], "width": size[1], "dtype": options.dtype}
    if journal.has({**identity, "backend": "timing"}) or journal.has_times(identity):
        return True
    print(f"feature {size[0]} x {size[1]}, {options.dtype}", flush=True)
    where = common.machine(device)
    student, teacher = (2 * floors.random_rows(*size, dtype, device) for _ in range(2))
    student.requires_grad_()
    field, truth = contenders(student, teacher), make_truth(student, teacher)
    timed, reasons = race.race(
        identity, field, truth, journal, device, dtype, options.seconds, where
    )
    least_ms = 1e3 * 5 * student.nbytes / floors.copy_bandwidth(device)
    eager_ms = timed["eager"].both.median_ms if "eager" in timed else None
    shown = []
    for name, x in timed.items():
        row = {
            "forward": x.forward and x.forward._asdict(),
            "forward_backward": x.both._asdict(),
            "least_ms": least_ms,
            "share_bandwidth": least_ms / x.both.median_ms,
            "peak_mib": round(x.peak_mib, 2),
            "errors": x.errors,
            "time_vs_eager": eager_ms and x.both.median_ms / eager_ms,
        }
        journal.add({**identity, "backend": name}, **row, truth=truth.source, **where)
        shown.append(cells(name, row))
    rate = floors.copy_bandwidth(device) / 1e9
    common.show(f"{where['device']}, {rate:.0f} GB/s by a copy", COLUMNS, shown)
    for name, reason in reasons.items():
        print(f"  no time for {name}: {reason}", flush=True)
    journal.rest()
    return not any(c.ours and c.name in reasons for c in field)


def make_truth(student: Tensor, teacher: Tensor) -> Truth:
    """Loss and gradient by the oracle."""
    double = student.detach().double().requires_grad_()
    loss = reference.feature(double, teacher.double(), normalize=True)
    gradient = torch.autograd.grad(loss, double)[0]
    return Truth(loss.detach(), {"student": gradient}, "float64 oracle")


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    both, ratio = row["forward_backward"], row["time_vs_eager"]
    return [
        name,
        f"{row['forward']['median_ms']:.3f}",
        f"{both['median_ms']:.3f}",
        f"{both['p20_ms']:.3f}-{both['p80_ms']:.3f}",
        f"{row['share_bandwidth']:.0%}",
        f"{row['peak_mib']:.1f}",
        f"{ratio:.2f}" if ratio else "",
        f"{row['errors']['student']:.0e}",
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = [32768, 4096] if on_gpu else [4096]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes)
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024] if on_gpu else [512])
    common.add_timing_options(parser, on_gpu)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    journal = common.Journal(options.json, resume=options.resume)
    sizes = [(rows, width) for rows in options.rows for width in options.width]
    right = [run_size(size, options, journal) for size in sizes]
    return 0 if all(right) else race.WRONG


if __name__ == "__main__":
    sys.exit(main())
