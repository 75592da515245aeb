# SPDX-License-Identifier: Apache-2.0
"""Time of losses of rows alone: this engine against torch.

    python benchmarks/bench_feature.py [--case feature] [--rows 32768] [--width 512 1024]
        [--json FILE]

Forward and backward. Cases: ``feature``, normalise and squared error of one modality; ``towers``,
the same of image and text together, with the unit rows that other losses share; ``moments``,
IFAlign. Backends: ours (``torch``, ``triton``, ``cuda``), and torch ``eager`` and ``compiled``, in
float32. Compared with float64 first. The share is that of a memory copy measured in the same run:
the least traffic reads what a pass needs once and writes its results once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
Rows = list[Tensor]


class Case(NamedTuple):
    """A loss of students and teachers.

    Attributes:
        op: whose backends run it.
        towers: students, and teachers.
        passes: the least traffic, forward and backward, in matrices of one student's bytes.
        loss: ours, by a backend.
        dense: as one would write it in torch.
        oracle: in float64.
    """

    op: str
    towers: int
    passes: int
    loss: Callable[[Rows, Rows, str], Tensor]
    dense: Callable[[Rows, Rows], Tensor]
    oracle: Callable[[Rows, Rows], Tensor]


def one_tower(students: Rows, teachers: Rows, backend: str) -> Tensor:
    return losses.feature(students[0], teachers[0], normalize=True, backend=backend)


def all_towers(students: Rows, teachers: Rows, backend: str) -> Tensor:
    return losses.unit_feature(students, teachers, backend=backend)[0]


def alignment(students: Rows, teachers: Rows, backend: str) -> Tensor:
    return losses.moment_alignment(students[0], teachers[0], backend=backend)


def dense_feature(students: Rows, teachers: Rows) -> Tensor:
    total = torch.zeros((), device=students[0].device)
    for pair in zip(students, teachers, strict=True):
        total = total + F.mse_loss(*(F.normalize(x.float(), dim=1) for x in pair))
    return total


def dense_alignment(students: Rows, teachers: Rows) -> Tensor:
    student, teacher = students[0].float(), teachers[0].float()
    of_variance = student.var(0, unbiased=False) - teacher.var(0, unbiased=False)
    return (student.mean(0) - teacher.mean(0)).abs().mean() + of_variance.abs().mean()


def true_feature(students: Rows, teachers: Rows) -> Tensor:
    pairs = zip(students, teachers, strict=True)
    return torch.stack([reference.feature(*pair, normalize=True) for pair in pairs]).sum()


def true_alignment(students: Rows, teachers: Rows) -> Tensor:
    return reference.moment_alignment(students[0], teachers[0])


CASES = {
    # both inputs; both again, and the gradient
    "feature": Case("feature", 1, 2 + 3, one_tower, dense_feature, true_feature),
    # and the unit rows, of two towers
    "towers": Case("feature", 2, 2 * (3 + 3), all_towers, dense_feature, true_feature),
    # the backward needs the student alone
    "moments": Case("moments", 1, 2 + 2, alignment, dense_alignment, true_alignment),
}


def contenders(case: Case, students: Rows, teachers: Rows) -> list[Contender]:
    """Our backends, and torch eager and (on a GPU) compiled."""
    learned, found = _named(students), []
    is_cuda = students[0].is_cuda
    for name in sorted(n for op, n in _backend.MODULES if op == case.op):
        if name == "triton" and not is_cuda:
            continue
        reason = _backend.why_not(case.op, name, students)
        if reason:
            print(f"  {name}: {reason}")
            continue

        def loss(backend: str = name) -> Tensor:
            return case.loss(students, teachers, backend)

        found.append(Contender(name, loss, learned, ours=True))
    found.append(Contender("eager", lambda: case.dense(students, teachers), learned))
    if is_cuda:
        torch.compiler.reset()
        compiled = torch.compile(case.dense, dynamic=False)
        found.append(Contender("compiled", lambda: compiled(students, teachers), learned))
    return found


def _named(students: Rows) -> dict[str, Tensor]:
    return dict(zip(("student", "text"), students, strict=False))


def run_size(
    name: str, size: tuple[int, int], options: argparse.Namespace, journal: common.Journal
) -> bool:
    """Measure, print and write a case of one size (rows, width); whether all of ours are right."""
    case, device = CASES[name], torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    identity = {"benchmark": "feature", "case": name, "rows": size[0], "width": size[1]}
    identity["dtype"] = options.dtype
    if journal.has({**identity, "backend": "timing"}) or journal.has_times(identity):
        return True
    print(f"{name} {size[0]} x {size[1]}, {options.dtype}", flush=True)
    where = common.machine(device)
    # moments differ by more than rounding
    students = [2 * floors.random_rows(*size, dtype, device) + 1 for _ in range(case.towers)]
    teachers = [3 * floors.random_rows(*size, dtype, device) for _ in range(case.towers)]
    for student in students:
        student.requires_grad_()
    field, truth = contenders(case, students, teachers), make_truth(case, students, teachers)
    timed, reasons = race.race(
        identity, field, truth, journal, device, dtype, options.seconds, where
    )
    least_ms = 1e3 * case.passes * students[0].nbytes / floors.copy_bandwidth(device)
    eager_ms = timed["eager"].both.median_ms if "eager" in timed else None
    shown = []
    for backend, x in timed.items():
        row = {
            "forward": x.forward and x.forward._asdict(),
            "forward_backward": x.both._asdict(),
            "least_ms": least_ms,
            "share_bandwidth": least_ms / x.both.median_ms,
            "peak_mib": round(x.peak_mib, 2),
            "errors": x.errors,
            "time_vs_eager": eager_ms and x.both.median_ms / eager_ms,
        }
        journal.add({**identity, "backend": backend}, **row, truth=truth.source, **where)
        shown.append(cells(backend, row))
    rate = floors.copy_bandwidth(device) / 1e9
    common.show(f"{where['device']}, {rate:.0f} GB/s by a copy", COLUMNS, shown)
    for backend, reason in reasons.items():
        print(f"  no time for {backend}: {reason}", flush=True)
    journal.rest()
    return not any(c.ours and c.name in reasons for c in field)


def make_truth(case: Case, students: Rows, teachers: Rows) -> Truth:
    """Loss and gradients by the oracle."""
    doubles = [x.detach().double().requires_grad_() for x in students]
    loss = case.oracle(doubles, [x.double() for x in teachers])
    gradients = torch.autograd.grad(loss, doubles)
    return Truth(loss.detach(), _named(list(gradients)), "float64 oracle")


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
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
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
    right = [run_size(case, size, options, journal) for case in options.case for size in sizes]
    return 0 if all(right) else race.WRONG


if __name__ == "__main__":
    sys.exit(main())
