# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the relational losses: this engine against dense eager losses.

    python benchmarks/bench_similarity.py [--rows 1024 4096] [--width 512] [--compile] [--json FILE]

Backends of the table: ``torch`` (``kdengine.losses``), ``eager`` (``kdengine.reference``, dense,
in the same dtype), ``open_clip`` (its ClipLoss and DistillClipLoss, where installed) and, with
``--compile``, ``compiled`` (torch.compile of the dense one). Each makes both losses' values and
the gradients of image, text and scale, of the same tensors. Every backend is compared with the
float64 oracle first; if one is wrong, no time is printed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402
from kdengine import losses, reference  # noqa: E402

Inputs = dict[str, Tensor]
TEACHER_SCALE = 50.0
PARITY_ROWS = 1024
OBJECTIVES = {"InfoNCE": 0.0, "InfoNCE+CRD": 0.5}
# relative errors of loss and gradients, worst allowed
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-1)}


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random unit rows; student pairs agree weakly, as in the middle of a training."""
    generator = torch.Generator().manual_seed(0)

    def unit(*means: Tensor) -> Tensor:
        return F.normalize(sum(means, torch.randn(rows, width, generator=generator)), dim=1)

    image, teacher_image = unit(), unit()
    features = {
        "image": image,
        "text": unit(8 * image),
        "teacher_image": teacher_image,
        "teacher_text": unit(8 * teacher_image),
    }
    inputs = {name: x.to(device, dtype) for name, x in features.items()}
    inputs["scale"] = torch.tensor(14.3, device=device)
    for name in ("image", "text", "scale"):
        inputs[name].requires_grad_()
    return inputs


def similarity_loss(module, inputs: Inputs, soft: float) -> Tensor:
    """The objective by ``losses`` or by ``reference``, whose calls are the same."""
    teacher = {
        "teacher_query": inputs["teacher_image"],
        "teacher_key": inputs["teacher_text"],
        "teacher_scale": TEACHER_SCALE,
    }
    return module.similarity_loss(
        inputs["image"],
        inputs["text"],
        inputs["scale"],
        **(teacher if soft else {}),
        soft_rows=soft,
        soft_cols=soft,
    )


def open_clip_loss(inputs: Inputs, soft: float) -> Tensor:
    """The objective by open_clip; its distillation loss has the teacher's entropy on top."""
    from open_clip.loss import ClipLoss, DistillClipLoss

    student = (inputs["image"], inputs["text"], inputs["scale"])
    if not soft:
        return ClipLoss()(*student)
    teacher = (inputs["teacher_image"], inputs["teacher_text"], TEACHER_SCALE)
    contrastive, distill = DistillClipLoss()(*student, *teacher)
    return contrastive + 2 * soft * distill


def backends(with_compile: bool) -> dict[str, Callable[[Inputs, float], Tensor]]:
    """The contenders, ours first."""
    found = {
        "torch": lambda inputs, soft: similarity_loss(losses, inputs, soft),
        "eager": lambda inputs, soft: similarity_loss(reference, inputs, soft),
    }
    try:
        import open_clip.loss  # noqa: F401

        found["open_clip"] = open_clip_loss
    except ImportError:
        print("open_clip is not installed: left out")
    if with_compile:
        found["compiled"] = torch.compile(found["eager"])
    return found


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs[x] for x in ("image", "text", "scale")]))


def check_parity(contenders: dict, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Exit unless every contender agrees with the oracle, on the same (rounded) features."""
    inputs = make_inputs(PARITY_ROWS, width, dtype, device)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    double |= {name: double[name].detach() for name in ("teacher_image", "teacher_text")}
    for objective, soft in OBJECTIVES.items():
        truth = similarity_loss(reference, double, soft)
        true_gradients = gradients(truth, double)
        loss_limit, gradient_limit = LIMITS[dtype]
        for name, contender in contenders.items():
            loss = contender(inputs, soft)
            found = gradients(loss, inputs)
            error = max(
                ((x.double() - y).norm() / y.norm()).item()
                for x, y in zip(found, true_gradients, strict=True)
            )
            # open_clip's soft cross-entropy is a constant above the divergence
            loss_error = (
                0.0 if name == "open_clip" and soft else abs(loss.item() / truth.item() - 1)
            )
            print(f"parity {objective}, {name}: loss {loss_error:.0e}, gradients {error:.0e}")
            if loss_error > loss_limit or error > gradient_limit:
                sys.exit(f"{name} is wrong: at most {loss_limit:.0e} and {gradient_limit:.0e}")


def measure(
    contender: Callable[[Inputs, float], Tensor], inputs: Inputs, soft: float
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without graph, and forward with backward."""

    def forward() -> object:
        with torch.no_grad():
            return contender(inputs, soft)

    return forward, lambda: gradients(contender(inputs, soft), inputs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=4.0, help="per table row, about")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    contenders = backends(args.compile)
    check_parity(contenders, args.width, dtype, device)
    where = common.machine(device)
    table = []
    for rows in args.rows:
        inputs = make_inputs(rows, args.width, dtype, device)
        for objective, soft in OBJECTIVES.items():
            runs = {name: measure(x, inputs, soft) for name, x in contenders.items()}
            forward = common.time_interleaved(
                {k: x[0] for k, x in runs.items()}, device, args.seconds
            )
            both = common.time_interleaved({k: x[1] for k, x in runs.items()}, device, args.seconds)
            peak = {k: common.peak_bytes(x[1], device) for k, x in runs.items()}
            for name in runs:
                ratio = both[name].median_ms / both["eager"].median_ms
                memory = peak[name] / peak["eager"]
                row = {
                    "benchmark": "similarity",
                    "objective": objective,
                    "rows": rows,
                    "width": args.width,
                    "dtype": args.dtype,
                    "backend": name,
                    "forward": forward[name]._asdict(),
                    "forward_backward": both[name]._asdict(),
                    "peak_mib": round(peak[name] / common.MIB, 2),
                    "time_vs_eager": round(ratio, 3),
                    "memory_vs_eager": round(memory, 4),
                    **where,
                }
                common.append_json(args.json, row)
                spread = f"{both[name].p20_ms:.0f}-{both[name].p80_ms:.0f}"
                table.append(
                    [f"{objective} {rows} x {args.width}", name]
                    + [f"{forward[name].median_ms:.1f}", f"{both[name].median_ms:.1f}", spread]
                    + [f"{peak[name] / common.MIB:.1f}", f"{ratio:.2f}", f"{memory:.3f}"]
                )
    columns = ["problem", "backend", "fwd ms", "fwd+bwd ms", "p20-p80", "peak MiB"]
    title = f"{where['device']}, {args.dtype}, {args.threads} threads, {where['commit']}"
    common.show(title, [*columns, "time vs eager", "memory vs eager"], table)


if __name__ == "__main__":
    main()
