# SPDX-License-Identifier: Apache-2.0
"""Whether every kernel compiles, runs and is right: one small case each, before anything else.

    python benchmarks/smoke.py [--json FILE]

Prints a line a case at once: seconds (compilation included), errors against the float64 oracle,
or what was raised. A few hundred rows on a GPU; with ``TRITON_INTERPRET=1`` a few dozen without.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, race  # noqa: E402
from benchmarks.race import Contender, Truth  # noqa: E402
from kdengine import losses, reference  # noqa: E402
from kdengine.ops import _backend, extension  # noqa: E402

Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """A loss by ``losses`` or ``reference``, of an op; ``far`` are features that point apart."""

    op: str
    loss: Callable[..., Tensor]
    far: bool = False


def relational(module: ModuleType, x: Inputs, teachers: int, **options: Any) -> Tensor:
    """All terms that this number of teachers allows, each with a weight of its own."""
    more: dict[str, Any] = {"hard_rows": 0.3, "hard_cols": 0.7}
    if teachers:
        more |= {
            "teacher_query": [x["teacher_image"]] * teachers,
            "teacher_key": [x["teacher_text"]] * teachers,
            "teacher_scale": [20.0, 50.0][:teachers],
            "soft_rows": 1.1,
            "soft_cols": 0.4,
        }
    return module.similarity_loss(x["image"], x["text"], x["scale"], **more, **options)


def info_nce(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Statistics of one matrix, its gradient strips."""
    return relational(module, x, 0, **options)


def one_teacher(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Student and teacher in one tile."""
    return relational(module, x, 1, **options)


def two_teachers(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Targets first, then the student added."""
    return relational(module, x, 2, **options)


def rows_against_constants(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """One sweep that keeps what the keys add up to."""
    pair = (x["wide_image"], x["wide_text"], x["scale"])
    teacher = (x["teacher_image"], x["teacher_text"])
    return module.interactive_contrastive(*pair, *teacher, **options)


def clusters(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Rows and the gradient of their keys from one sweep, with a margin."""
    labels = torch.arange(len(x["image"]), device=x["image"].device).flip(0)
    triple = (x["image"], x["text"], x["scale"])
    return module.cluster_cross_entropy(*triple, labels, 0.2, **options)


def rows_of_a_teacher(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """The same by way of both matrices' logits."""
    teacher = (x["teacher_image"], x["teacher_text"], 20.0)
    return module.logit_kl(x["image"], x["text"], x["scale"], *teacher, temperature=2.0, **options)


def log_sum_exps(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Rows without one column each."""
    exclude = torch.arange(len(x["image"]), device=x["image"].device).flip(0)
    triple = (x["image"], x["text"], x["scale"])
    return module.similarity_lse(*triple, exclude=exclude, **options).square().mean()


def feature(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Distance of rows as they are."""
    return module.feature(x["wide_image"], x["teacher_image"], **options)


def feature_normalised(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Distance of rows made unit rows."""
    return module.feature(3 * x["wide_image"], x["teacher_image"], normalize=True, **options)


def moments(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """Moments of columns against the teacher's, which lie aside."""
    return module.moment_alignment(3 * x["wide_image"], x["teacher_image"] + 0.5, **options)


def gradient(module: ModuleType, x: Inputs, **options: Any) -> Tensor:
    """The student's InfoNCE gradients against the teacher's."""
    pair = (x["wide_image"], x["wide_text"], x["scale"])
    loss = module.gradient(*pair, x["teacher_image"], x["teacher_text"], 20.0, **options)
    # as the paper weighs it: the mean over batch and width is tiny
    return 1e8 * loss


CASES = {
    "InfoNCE": Case("similarity", info_nce),
    "InfoNCE+CRD": Case("similarity", one_teacher),
    "two teachers": Case("similarity", two_teachers),
    "constant keys": Case("similarity", rows_against_constants),
    "log-sum-exp": Case("similarity", log_sum_exps),
    "clusters": Case("similarity_rows", clusters),
    "rows of a teacher": Case("similarity_rows", rows_of_a_teacher),
    "clusters, repeated sweep": Case("similarity_rows", clusters, far=True),
    "InfoNCE, repeated sweep": Case("similarity", info_nce, far=True),
    "InfoNCE+CRD, repeated sweep": Case("similarity", one_teacher, far=True),
    "feature": Case("feature", feature),
    "feature, normalised": Case("feature", feature_normalised),
    "moments": Case("moments", moments),
    "gradient": Case("gradient", gradient),
}


def make_inputs(rows: int, widths: tuple[int, int], far: bool, dtype: torch.dtype) -> Inputs:
    """Unit rows in float64 that the dtype can hold; ``far`` ones make every exponential tiny."""
    generator = torch.Generator().manual_seed(0)

    def unit(width: int, *means: Tensor) -> Tensor:
        noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return F.normalize(sum(means, F.normalize(noise, dim=1)), dim=1)

    student, teacher = widths
    axis = torch.zeros(student, dtype=torch.float64)
    axis[0] = 3.0 if far else 0.0
    image, teacher_image = unit(student, axis), unit(teacher)
    features = {
        "image": image,
        "text": unit(student, -axis if far else image),
        "wide_image": unit(teacher, teacher_image),
        "wide_text": unit(teacher, teacher_image),
        "teacher_image": teacher_image,
        "teacher_text": unit(teacher, teacher_image),
    }
    inputs = {name: x.to(dtype).double() for name, x in features.items()}
    inputs["scale"] = torch.tensor(100.0 if far else 14.3, dtype=torch.float64)
    return inputs


def leaves(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The same numbers in a dtype, those of the student with a gradient; a scale in float32."""
    low = torch.promote_types(dtype, torch.float32)
    found = {k: x.to(device, dtype if x.ndim else low) for k, x in inputs.items()}
    for name, x in found.items():
        x.requires_grad_(not name.startswith("teacher"))
    return found


def run_case(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Errors of one case, and the reason if it is wrong."""
    sizes = (512, (512, 768)) if device.type == "cuda" else (48, (32, 40))
    inputs = make_inputs(*sizes, case.far, dtype)
    double, own = leaves(inputs, torch.float64, device), leaves(inputs, dtype, device)
    true = case.loss(reference, double)
    learned = {k: x for k, x in double.items() if x.requires_grad}
    slopes = torch.autograd.grad(true, list(learned.values()), allow_unused=True)
    slopes_of = {k: g for k, g in zip(learned, slopes, strict=True) if g is not None}
    contender = Contender(
        backend,
        lambda: case.loss(losses, own, backend=backend),
        {name: own[name] for name in slopes_of},
        ours=True,
    )
    start = time.perf_counter()
    errors, reason = race.check(contender, Truth(true.detach(), slopes_of, "oracle"), dtype)
    return {"errors": errors, "reason": reason, "time_s": round(time.perf_counter() - start, 2)}


def plan(device: torch.device) -> list[tuple[str, str, torch.dtype]]:
    """Case, backend and dtype; the interpreter cannot multiply bfloat16."""
    dtypes = [torch.float32, torch.float16]
    if device.type == "cuda":
        dtypes.insert(0, torch.bfloat16)
    return [
        (name, backend, dtype)
        for dtype in dtypes
        for name, case in CASES.items()
        for op, backend in _backend.MODULES
        if op == case.op and backend != "torch"
        # without the extension there is nothing to try
        if backend != "cuda" or not extension.why_not(device.type)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="append one JSON line a case to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    journal = common.Journal(options.json, resume=options.resume)
    where, num_wrong = common.machine(device), 0
    for name, backend, dtype in plan(device):
        kind = str(dtype).removeprefix("torch.")
        identity = {"benchmark": "smoke", "case": name, "dtype": kind, "backend": backend}
        if journal.has(identity):
            continue
        journal.start(identity)
        row = run_case(CASES[name], backend, dtype, device)
        journal.add(identity, **row, **where)
        num_wrong += row["reason"] is not None
        told = " ".join(f"{key} {error:.0e}" for key, error in row["errors"].items())
        verdict = "ok   " if row["reason"] is None else "WRONG"
        line = f"{verdict} {kind} {backend} {name}: {told} {row['reason'] or ''}"
        print(f"{line} ({row['time_s']:.1f} s)", flush=True)
        if row["reason"] and common.is_device_lost():
            return race.DEVICE_LOST
    print(f"smoke: {num_wrong} wrong", flush=True)
    return race.WRONG if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
