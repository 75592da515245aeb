# SPDX-License-Identifier: Apache-2.0
"""Masks, cut, uneven towers and micro-batches on a GPU: the numbers of a CPU, and exact resume."""

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdengine.config import Prune

DEVICE = "cuda"
TOWERS = ("image", "text")
STUDENT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
CUT, STEPS = 4, 8
# name: ZeRO stage, precision, micro-batches, and the step it is resumed at: before, at, after the
# cut. All are pruned
MODES = {
    "0-fp32": (0, "fp32", 2, 2),
    "1-amp_bf16": (1, "amp_bf16", 2, CUT),
    "2-bf16": (2, "bf16", 1, 6),
}

# trains every line, then again from its checkpoint; kernels that add in any order would hide what
# is tested, and so would attention's own choice among them
TRAIN = """
import json, shutil, sys, torch
from pathlib import Path
from kdengine.train import main
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = False
for kernel in ("flash", "mem_efficient", "cudnn"):
    getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
for folder, words, stop in json.loads(sys.argv[1]):
    assert main(words) == 0
    shutil.copy(Path(folder, "metrics.jsonl"), Path(folder, "whole.jsonl"))
    assert main([*words, "--resume", str(stop)]) == 0
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    pytest.importorskip("open_clip", reason="the towers are made of it")
    path = tmp_path / "student.json"
    path.write_text(json.dumps(STUDENT))
    return str(path)


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """The first convolution in fp32, as the rest: cuDNN rounds to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Refuse what makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    return image, torch.randint(1, 49407, (8, 16), generator=generator)


def factors_of(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Some units off, the others soft; a layer without heads, one without neurons."""
    generator, found = torch.Generator().manual_seed(1), {}
    for tower, shape in shapes.items():
        sizes = {"channels": shape.width}
        sizes |= {f"{n}.heads": size for n, size in enumerate(shape.heads)}
        sizes |= {f"{n}.neurons": size for n, size in enumerate(shape.neurons)}
        for name, size in sizes.items():
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            found[f"{tower}.{name}"] = (drawn > 0.3) * (0.1 + 0.9 * drawn)
        found[f"{tower}.0.heads"][:] = 0
        found[f"{tower}.1.neurons"][:] = 0
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double().cpu() - wanted.detach()).norm() / wanted.detach().norm())


# the weights' rounding, a few layers deep; what channels cancel makes a gradient's larger
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-2, 0.2)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_gates_and_their_cut_equal_those_in_float64(config_file: str, dtype: torch.dtype) -> None:
    from kdengine.models import build_student
    from kdengine.models.pruning.cut import cut
    from kdengine.models.pruning.masks import L0Masks
    from kdengine.models.pruning.ragged import install_ragged, tower_shape

    tower = build_student(config_file, seed=0).tower.double().eval()
    weights = tower.clip.state_dict()
    shapes: dict[str, Any] = {x: tower_shape(tower.clip, x) for x in TOWERS}
    factors = factors_of(shapes)

    def gated(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings, and gradients of a sum of them to every factor of the neurons."""
        here = copy.deepcopy(tower)
        gates = {x: install_ragged(here.clip, x, shapes[x]) for x in TOWERS}
        here.clip.load_state_dict(weights)
        here.to(device, dtype)
        own = {k: x.to(device, dtype).requires_grad_() for k, x in factors.items()}
        L0Masks(shapes).set_gates(gates, own)
        image, tokens = batch()
        found = list(here(image.to(device, dtype), tokens.to(device))[:2])
        weight = torch.linspace(-1, 1, 32, device=device, dtype=dtype)
        total = sum((x * weight).sum() for x in found)
        named = [own[f"{x}.0.neurons"] for x in TOWERS]
        return found, list(torch.autograd.grad(total, named))

    wanted, found = gated("cpu", torch.float64), gated(DEVICE, dtype)
    for kind, limit in enumerate(LIMITS[dtype]):
        for x, true_x in zip(found[kind], wanted[kind], strict=True):
            assert distance(x, true_x) <= limit
    tensors, cut_shapes = cut(weights, shapes, factors)
    for name, shape in cut_shapes.items():
        install_ragged(tower.clip, name, shape)
    tower.clip.load_state_dict(tensors)
    tower.to(DEVICE, dtype)
    image, tokens = batch()
    for x, true_x in zip(tower(image.to(DEVICE), tokens.to(DEVICE))[:2], wanted[0], strict=True):
        assert distance(x, true_x) <= LIMITS[dtype][0]


def test_a_masked_norm_and_a_draw_make_no_host_wait(config_file: str) -> None:
    from kdengine.models.pruning.masks import L0Masks
    from kdengine.models.pruning.ragged import GatedNorm, Gates, RaggedShape

    shape = RaggedShape(width=64, head_width=32, heads=(2, 2), neurons=(256, 256))
    masks, gates = L0Masks({"image": shape}).to(DEVICE), Gates()
    norm = GatedNorm(64, 1e-5, gates).to(DEVICE)
    stream = torch.randn(4, 17, 64, device=DEVICE, requires_grad=True)
    for step in range(2):
        # what is loaded at the first call may wait
        with no_waits() if step else contextlib.nullcontext():
            drawn = masks.draw(step)
            gates.channels = drawn["image.channels"]
            out = norm(gates.write(stream)).square().sum()
            (out + masks.penalty(0.5)).backward()
            masks.clamp_()
    assert stream.grad is not None and bool(stream.grad.isfinite().all())


def test_masks_on_a_gpu_reach_their_budget(config_file: str) -> None:
    from kdengine.models import build_student
    from kdengine.pruning import Pruning, lacking

    student = build_student(config_file, seed=0)
    settings = Prune(target=0.5, steps=100, warmup=20, mask_lr=0.1)
    pruning = Pruning(student, settings, device=DEVICE)
    student.tower.to(DEVICE)
    image, tokens = (x.to(DEVICE) for x in batch())
    for step in range(100):
        pruning.begin(step)
        student.tower(image.float(), tokens).image.square().sum().backward()
        pruning.finish(step, applied=True)
    # a head is 1.4 % of these small towers
    view = pruning.view({k: x.cpu() for k, x in student.tower.clip.state_dict().items()})
    assert lacking(view.spec) == pytest.approx(0.5, abs=0.02)


class Engine:
    """What a training engine does to a step of one process: nothing."""

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module, torch.device(device)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass


def test_parts_of_a_batch_under_gates_have_the_gradients_of_the_whole(config_file: str) -> None:
    pytest.importorskip("deepspeed", reason="checkpoints need it")
    from kdengine.accumulate import Accumulation
    from kdengine.methods import Clip, Distillation
    from kdengine.models import build_student
    from kdengine.models.pruning.masks import L0Masks
    from kdengine.models.pruning.ragged import install_ragged, tower_shape

    def step(device: str, dtype: torch.dtype, num_parts: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients of all weights and factors."""
        tower = build_student(config_file, seed=0).tower
        weights = tower.clip.state_dict()
        shapes: dict[str, Any] = {x: tower_shape(tower.clip, x) for x in TOWERS}
        gates = {x: install_ragged(tower.clip, x, shapes[x]) for x in TOWERS}
        tower.clip.load_state_dict(weights)
        root = Distillation(tower, Clip()).to(device, dtype).train()
        factors = {k: x.to(device, dtype).requires_grad_() for k, x in factors_of(shapes).items()}
        L0Masks(shapes).set_gates(gates, factors)
        image, tokens = batch()
        image, tokens = image.to(device, dtype), tokens.to(device)
        size = len(image) // num_parts
        parts = iter(
            {"image": image[i : i + size], "tokens": tokens[i : i + size]}
            for i in range(0, len(image), size)
        )
        passes = Accumulation(Engine(root, device), None, num_parts)
        loss, _ = passes.forward(parts.__next__, False)
        passes.backward(loss)
        named = dict(root.named_parameters()) | factors
        return loss, {name: x.grad for name, x in named.items() if x.grad is not None}

    loss, gradients = step("cpu", torch.float64, 1)
    for num_parts in (1, 4):
        found, others = step(DEVICE, torch.float32, num_parts)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        assert others.keys() == gradients.keys()
        largest = max(float(x.norm()) for x in gradients.values())
        for name, x in gradients.items():
            off = float((others[name].double().cpu() - x).norm())
            assert off <= 1e-3 * max(float(x.norm()), 1e-3 * largest), name


@pytest.fixture(scope="module")
def runs(repository, picture, encode, write_shard, tmp_path_factory) -> Path:
    """The folder of pruned runs, one for every mode."""
    for package in ("deepspeed", "open_clip", "nvidia.dali", "tyro"):
        pytest.importorskip(package, reason="training needs it")
    from kdengine.models import build_student, export_student

    folder = tmp_path_factory.mktemp("pruning")
    (folder / "student.json").write_text(json.dumps(STUDENT))
    teacher = build_student(str(folder / "student.json"), seed=1)
    export_student(teacher.tower.state_dict(), teacher.spec, folder / "teacher")
    images = [encode(picture(number, (40, 36)), "JPEG") for number in range(64)]
    captions = [f"picture number {number} of the set".encode() for number in range(64)]
    samples = [{"jpg": a, "txt": b} for a, b in zip(images, captions, strict=True)]
    shard = write_shard(folder / "0.tar", samples)

    def line(name: str, stage: int, precision: str, accum_freq: int) -> list[str]:
        words = ["--model.model", str(folder / "student.json"), "--data.train-data", shard]
        words += ["--data.workers", "2", "--data.shuffle-buffer", "32", "--optim.warmup", "2"]
        words += ["--method.name", "tinyclip", "--method.tinyclip.alpha", "0.5"]
        words += ["--distill.distill-model", f"local-dir:{folder / 'teacher'}"]
        words += ["--train.batch-size", str(32 // accum_freq), "--train.steps", str(STEPS)]
        words += ["--train.accum-freq", str(accum_freq), "--train.precision", precision]
        words += ["--train.zero-stage", str(stage), "--run.logs", str(folder), "--run.name", name]
        words += ["--run.log-every-n-steps", "1", "--run.no-tensorboard"]
        words += ["--prune.target", "0.5", "--prune.steps", str(CUT), "--prune.warmup", "2"]
        words += ["--prune.mask-lr", "0.5", "--run.save-every-n-steps", "2", "--run.keep-last", "9"]
        return words

    lines = [(str(folder / name), line(name, *mode), stop) for name, (*mode, stop) in MODES.items()]
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(lines)],
        env={**os.environ, "PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert f"ranks: 1 on {DEVICE}" in (folder / "0-fp32" / "out.log").read_text()
    return folder


def records(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_a_pruned_run_is_the_same_from_its_checkpoint(runs: Path, mode: str) -> None:
    stop = MODES[mode][-1]
    whole, resumed = records(runs / mode, "whole.jsonl"), records(runs / mode)
    assert [r["step"] for r in whole] == list(range(1, STEPS + 1))
    assert ["sparsity" in r for r in whole] == [True] * CUT + [False] * (STEPS - CUT)
    assert all(math.isfinite(r["loss"]) for r in whole) and whole[-1]["num_skipped"] == 0
    # that these steps were taken anew
    assert [r["time_s"] for r in resumed[stop:]] != [r["time_s"] for r in whole[stop:]]
    for name in ("loss", "grad_norm", "lr", "sparsity"):
        assert [r.get(name) for r in resumed] == [r.get(name) for r in whole], name


@pytest.mark.parametrize("mode", MODES)
def test_what_a_pruned_run_exports_is_half_and_embeds(runs: Path, mode: str) -> None:
    from kdengine.models import load_model
    from kdengine.pruning import lacking

    student = load_model(runs / mode / "export")
    assert lacking(student.spec) == pytest.approx(0.5, abs=0.02)
    image, tokens = batch()
    found = student.tower.to(DEVICE)(image.float().to(DEVICE), tokens.to(DEVICE))
    assert bool(found.image.isfinite().all()) and bool(found.text.isfinite().all())
