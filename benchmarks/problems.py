# SPDX-License-Identifier: Apache-2.0
"""What is benchmarked: objectives, inputs, the dense loss, the truth, and the list of problems."""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.race import Truth
from kdengine import losses, reference

Inputs = dict[str, Tensor]
TEACHER_SCALE, ICL_SCALE, FEATURE_WEIGHT = 50.0, 14.3, 2000.0
# float64 matrices of the dense oracle fit up to here
DENSE_ORACLE_ROWS = 8192


class Objective(NamedTuple):
    """Which terms of CLIP-KD, and the fewest products that do without storing a matrix.

    Attributes:
        hard: InfoNCE.
        soft: CRD.
        rest: both directions of ICL, and FD.
        units: 4 for InfoNCE, 6 with the teacher's matrix, 2 for each direction of ICL.
        raw: the rows are not of unit length; ``engine_loss`` normalises them, once for all terms.
    """

    hard: bool
    soft: bool
    rest: bool
    units: int
    raw: bool = False


OBJECTIVES = {
    "InfoNCE": Objective(True, False, False, 4),
    "InfoNCE+CRD": Objective(True, True, False, 6),
    "CRD": Objective(False, True, False, 6),
    "CLIP-KD": Objective(True, True, True, 10),
    "CLIP-KD raw": Objective(True, True, True, 10, raw=True),
}


class Problem(NamedTuple):
    """One comparison.

    Attributes:
        objective: a key of OBJECTIVES.
        rows: the batch B.
        width: D of the student.
        scale: of the student.
        dtype: of the features.
        field: who takes part: "all", "main" (no peers but open_clip) or "ours" (and memeff).
        compiled: torch.compile takes part.
        teacher_width: of the teacher, by default the student's.
    """

    objective: str
    rows: int
    width: int = 512
    scale: float = 14.3
    dtype: torch.dtype = torch.bfloat16
    field: str = "all"
    compiled: bool = False
    teacher_width: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its rows from others."""
        return {
            "benchmark": "similarity",
            "objective": self.objective,
            "rows": self.rows,
            "width": self.width,
            "teacher_width": self.teacher_width or self.width,
            "scale": self.scale,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Random unit rows of which a pair agrees so much that it has about half of its softmax.

    That is the middle of a training, at every batch, width and scale.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(width: int) -> Tensor:
        x = torch.randn(problem.rows, width, generator=generator, device=device)
        return F.normalize(x, dim=1)

    def pair(width: int, scale: float) -> tuple[Tensor, Tensor]:
        # log-sum-exp of B normal numbers of variance scale^2 / D
        cosine = min(0.9, (math.log(problem.rows) + scale**2 / (2 * width)) / scale)
        image = noise(width)
        text = cosine * image + math.sqrt(1 - cosine**2) * noise(width)
        return image, F.normalize(text, dim=1)

    image, text = pair(problem.width, problem.scale)
    teacher_image, teacher_text = pair(problem.teacher_width or problem.width, TEACHER_SCALE)
    features = {
        "image": image,
        "text": text,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
    }
    length = 3 if OBJECTIVES[problem.objective].raw else 1
    inputs = {name: (length * x).to(problem.dtype) for name, x in features.items()}
    inputs["scale"] = torch.tensor(problem.scale, device=device)
    inputs["icl_scale"] = torch.tensor(ICL_SCALE, device=device)
    for x in learned(problem, inputs).values():
        x.requires_grad_()
    return inputs


def learned(problem: Problem, inputs: Inputs) -> Inputs:
    """What gets a gradient."""
    names = ["image", "text", "scale"]
    names += ["icl_scale"] if OBJECTIVES[problem.objective].rest else []
    return {name: inputs[name] for name in names}


def engine_loss(module: ModuleType, x: Inputs, objective: Objective, **options: Any) -> Tensor:
    """The objective by ``losses`` or by ``reference``, whose calls are the same."""
    distances = None
    if objective.raw and module is reference:
        x = normalised(x)
    elif objective.raw:
        # as methods.ClipKD does: FD gives the unit rows of the other terms
        found = {name: x[name] for name in x if name.startswith("teacher")}
        x = x | {name: losses.unit_rows(y) for name, y in found.items()}
        names = ("image", "text")
        teachers = [found[f"teacher_{name}"] for name in names]
        distances, units = losses.unit_feature([x[name] for name in names], teachers, **options)
        x |= dict(zip(names, units, strict=True))
    teacher: dict[str, Any] = {
        "teacher_query": x["teacher_image"],
        "teacher_key": x["teacher_text"],
        "teacher_scale": TEACHER_SCALE,
    }
    hard, soft = 0.5 * objective.hard, 0.5 * objective.soft
    loss = module.similarity_loss(
        x["image"],
        x["text"],
        x["scale"],
        **(teacher if soft else {}),
        hard_rows=hard,
        hard_cols=hard,
        soft_rows=soft,
        soft_cols=soft,
        **options,
    )
    if not objective.rest:
        return loss
    if distances is None:
        both = (x["image"], x["teacher_image"]), (x["text"], x["teacher_text"])
        distances = sum(module.feature(mine, theirs, **options) for mine, theirs in both)
    student = (x["image"], x["text"], x["icl_scale"])
    interactive = module.interactive_contrastive(
        *student, x["teacher_image"], x["teacher_text"], **options
    )
    return loss + interactive + FEATURE_WEIGHT * distances


def normalised(x: Inputs) -> Inputs:
    """Unit rows in place of the features, each in its dtype; scales as they are."""
    return {k: _unit(v) if v.ndim else v for k, v in x.items()}


def _unit(x: Tensor) -> Tensor:
    low = x.dtype in (torch.bfloat16, torch.float16)
    return F.normalize(x.float() if low else x, dim=1).to(x.dtype)


def dense_loss(x: Inputs, objective: Objective) -> Tensor:
    """The objective as one would write it in torch, for autograd or torch.compile.

    Logits by one product a matrix in the features' dtype (bfloat16 logits for bfloat16 features),
    softmaxes in float32: what open_clip does under autocast, with one product instead of two, and
    one log-softmax a direction shared by hard and soft terms.
    """
    if objective.raw:
        x = normalised(x)
    logits = _logits(x["image"], x["text"], x["scale"])
    rows, cols = logits.log_softmax(1), logits.log_softmax(0)
    loss = logits.new_zeros(())
    if objective.hard:
        loss = loss - (rows.diagonal().mean() + cols.diagonal().mean()) / 2
    if objective.soft:
        targets = _logits(x["teacher_image"], x["teacher_text"], TEACHER_SCALE)
        for dim, student in ((1, rows), (0, cols)):
            wanted = targets.log_softmax(dim)
            divergence = F.kl_div(student, wanted, log_target=True, reduction="sum")
            loss = loss + divergence / (2 * len(logits))
    if objective.rest:
        numbers = torch.arange(len(logits), device=logits.device)
        for student, key in (("image", "teacher_text"), ("text", "teacher_image")):
            interactive = _logits(x[student], x[key], x["icl_scale"])
            loss = loss + F.cross_entropy(interactive, numbers) / 2
        for name in ("image", "text"):
            distance = F.mse_loss(x[name].float(), x[f"teacher_{name}"].float())
            loss = loss + FEATURE_WEIGHT * distance
    return loss


def _logits(image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    # a 0-D scale leaves the features' dtype as it is
    return ((scale * image) @ text.T).float()


def make_truth(problem: Problem, inputs: Inputs) -> Truth:
    """Loss and gradients in float64, of the same rounded features.

    Dense by the oracle where its matrices fit. Above that by our ``torch`` backend in float64,
    which is compared with the oracle at the smaller sizes and in the tests.
    """
    objective = OBJECTIVES[problem.objective]
    double = {name: x.detach().double() for name, x in inputs.items()}
    leaves = {name: double[name].requires_grad_() for name in learned(problem, inputs)}
    if problem.rows <= DENSE_ORACLE_ROWS:
        loss, source = engine_loss(reference, double, objective), "float64 oracle"
    else:
        loss = engine_loss(losses, double, objective, backend="torch")
        source = "float64 torch backend, in strips"
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Truth(loss.detach(), dict(zip(leaves, gradients, strict=True)), source)


def gpu_plan() -> list[Problem]:
    """The matrix of a GPU, most important first; what does not fit into the time is left out."""
    big, small, wide = 32768, 4096, (768, 1024)
    fp32 = torch.float32
    return [
        Problem("InfoNCE+CRD", big, compiled=True),
        Problem("InfoNCE", big, compiled=True),
        Problem("CLIP-KD", big, compiled=True),
        Problem("InfoNCE+CRD", small, compiled=True),
        Problem("InfoNCE", small, compiled=True),
        *(Problem("InfoNCE+CRD", big, width) for width in wide),
        *(Problem("InfoNCE", big, width) for width in wide),
        *(Problem("CLIP-KD", big, width, field="main") for width in wide),
        Problem("CLIP-KD raw", big, field="main"),
        Problem("InfoNCE+CRD", big, scale=100.0),
        Problem("InfoNCE", big, scale=100.0),
        Problem("CRD", big),
        Problem("InfoNCE+CRD", 1024, field="main", compiled=True),
        *(Problem("InfoNCE+CRD", rows, field="main") for rows in (8192, 16384, 65536)),
        *(Problem("InfoNCE", rows, field="main") for rows in (1024, 8192, 16384, 65536)),
        Problem("InfoNCE+CRD", big, teacher_width=768, field="main"),
        # with those above, each entry of tuning.VARIANTS
        *(
            Problem("InfoNCE+CRD", big, width, teacher_width=other, field="ours")
            for width, other in ((768, 512), (512, 1024), (1024, 512), (768, 1024), (1024, 768))
        ),
        Problem("InfoNCE+CRD", 131072, field="ours"),
        Problem("InfoNCE", 131072, field="ours"),
        Problem("CLIP-KD", small, field="main", compiled=True),
        Problem("InfoNCE+CRD", 8192, dtype=fp32, field="main"),
        Problem("InfoNCE", 8192, dtype=fp32, field="main"),
        Problem("InfoNCE+CRD", big, 640),
        *(Problem("InfoNCE+CRD", small, width, scale=100.0, field="main") for width in wide),
        Problem("InfoNCE+CRD", 131072, 1024, field="ours"),
    ]
