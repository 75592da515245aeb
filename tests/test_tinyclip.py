# SPDX-License-Identifier: Apache-2.0
"""Affinity mimicking against the oracle, its pinned scale, and the inherit command."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import config, reference
from kdengine.cli import main
from kdengine.inherit import Calibration, recalibrate, taylor
from kdengine.methods import Distillation, TinyClip, build_method
from kdengine.models import Features, build_student, export_student, load_model


def pairs(num: int, width: int, scale: float, seed: int) -> Features:
    torch.manual_seed(seed)
    image, text = (torch.randn(num, width, dtype=torch.float64) for _ in range(2))
    return Features(image, text, torch.tensor([scale], dtype=torch.float64))


def oracle(
    student: Features, teachers: list[Features], alpha: float, scale: float | None
) -> Tensor:
    """alpha times the mean affinity term, plus InfoNCE, dense."""
    x, y = (F.normalize(z, dim=-1) for z in student[:2])
    ours = student.scale if scale is None else scale
    soft = torch.zeros(())
    for teacher in teachers:
        u, v = (F.normalize(z, dim=-1) for z in teacher[:2])
        theirs = teacher.scale if scale is None else scale
        soft = soft + reference.contrastive_relational(x, y, ours, u, v, theirs) / len(teachers)
    return alpha * soft + (1 - alpha) * reference.info_nce(x, y, ours)


@pytest.mark.parametrize("scale", [50.0, None])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_equals_the_oracle_with_all_gradients(alpha: float, scale: float | None) -> None:
    student = Features(*(x.requires_grad_() for x in pairs(7, 5, 12.0, 0)))
    teachers = [pairs(7, 4, 30.0, 1), pairs(7, 6, 80.0, 2)]
    method = TinyClip(2, alpha=alpha, scale=scale)
    terms = method(student, teachers)
    assert set(terms) == set(method.weights)
    loss = sum(weight * terms[name] for name, weight in method.weights.items())
    wanted = oracle(student, teachers, alpha, scale)
    torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=1e-13)
    inputs = student if scale is None else student[:2]
    for found, want in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_a_student_like_its_teacher_has_loss_zero() -> None:
    teacher = pairs(6, 5, 90.0, 3)
    found = TinyClip()(teacher._replace(scale=torch.tensor([3.0])), [teacher])
    assert abs(float(found["affinity"])) < 1e-12


def _rank_loss(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    group = torch.distributed.group.WORLD if world_size > 1 else None
    student, teacher = pairs(6, 5, 12.0, 0), pairs(6, 4, 30.0, 1)
    rows = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    image = student.image[rows].clone().requires_grad_()
    method = TinyClip(alpha=0.7, group=group)
    own = Features(teacher.image[rows], teacher.text[rows], teacher.scale)
    terms = method(Features(image, student.text[rows], student.scale), [own])
    loss = sum(weight * terms[name] for name, weight in method.weights.items())
    loss.backward()
    assert image.grad is not None
    return loss.detach(), image.grad / world_size


def test_two_ranks_average_to_the_whole_batch(run_ranks: Callable[..., list[Any]]) -> None:
    whole, gradient = _rank_loss(0, 1)
    found = run_ranks(_rank_loss, 2)
    torch.testing.assert_close(sum(loss for loss, _ in found) / 2, whole)
    torch.testing.assert_close(torch.cat([part for _, part in found]), gradient)


def test_a_pinned_scale_is_a_constant_from_the_first_step() -> None:
    student = build_student("ViT-Pico-32", seed=0)
    method = build_method(
        config.Method(name="tinyclip"), student_width=student.spec.embed_dim, teacher_widths=[4]
    )
    root = Distillation(student.tower, method)
    assert root.log_scales() == [] and not student.tower.log_scale.requires_grad
    assert float(student.tower.log_scale) == pytest.approx(math.log(50))
    side = student.spec.preprocess.size
    image, tokens = torch.rand(3, 3, side, side), torch.ones(3, 8, dtype=torch.long)
    tokens = torch.ones(3, student.spec.context_length, dtype=torch.long)
    loss, logged = root(image, tokens, [Features(*(x.float() for x in pairs(3, 4, 9.0, 0)))])
    loss.backward()
    assert float(logged["scale"]) == pytest.approx(50) and set(logged) == {"affinity", "scale"}


@pytest.mark.parametrize("values", [{"alpha": 1.5}, {"scale": 0.5}, {"scale": 200.0}])
def test_settings_that_mean_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"method\.tinyclip"):
        config.TinyClip(**values)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """An exported ViT of 4 + 4 layers, 128 and 128 wide, for 32 pixels."""
    return exported(tmp_path, "teacher", 4, 128)


def exported(folder: Path, name: str, layers: int, width: int) -> str:
    vision = {"image_size": 32, "layers": layers, "width": width, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64}
    values = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "layers": layers}}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    tower, spec = build_student(str(path), seed=0)
    return str(export_student(tower.state_dict(), spec, folder / name))


def test_command_writes_an_export_and_its_report(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path, "student", 2, 64)
    words = ["inherit", str(tmp_path / "out"), "--teacher", teacher]
    words += ["--student", str(tmp_path / "student.json"), "--width", "magnitude"]
    assert main([*words, "--depth", "even"]) == 0
    told = capsys.readouterr().out
    assert "0 3" in told and "both, without token embedding" in told
    found = load_model(tmp_path / "out").tower.clip.state_dict()
    given = load_model(teacher).tower.clip.state_dict()
    report = json.loads((tmp_path / "out" / "inheritance.json").read_text())
    channels = report["units"]["image.channels"]
    name = "visual.transformer.resblocks.{}.ln_1.weight"
    assert torch.equal(found["visual.proj"], given["visual.proj"][channels])
    assert torch.equal(found[name.format(1)], given[name.format(3)][channels])
    # an export that may be replaced like any other
    assert main([*words, "--depth", "front"]) == 0


def test_taylor_wants_data(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inherit", str(tmp_path / "out"), "--teacher", teacher, "--student", "ViT-Pico-32"]
    assert main([*words, "--width", "taylor"]) == 2
    assert "--calibration SHARDS" in capsys.readouterr().err


def calibrate(scenes: Path, tmp_path: Path, num: int) -> Calibration:
    (shard,) = scenes.glob("scenes-train-*.tar")
    return Calibration(
        shards=str(shard), num_samples=num, batch_size=16, index_dir=str(tmp_path), num_threads=1
    )


def test_taylor_keeps_what_the_loss_depends_on(scenes: Path, tmp_path: Path, teacher: str) -> None:
    model = load_model(teacher)
    dead = torch.arange(512) % 2 == 0
    for tower in (model.tower.clip.visual.transformer, model.tower.clip.transformer):
        for block in tower.resblocks:
            with torch.no_grad():
                block.mlp.c_proj.weight[:, dead] = 0
    found = taylor(model, calibrate(scenes, tmp_path, 32))
    neurons = {group: score for group, score in found.items() if group.endswith("neurons")}
    assert len(neurons) == 8
    for score in neurons.values():
        assert (score[dead] == 0).all() and (score[~dead] > 0).all()
    assert (found["image.channels"] > 0).all() and found["text.channels"].shape == (128,)
    # another pass over the same batches says the same
    again = taylor(model, calibrate(scenes, tmp_path, 32))
    torch.testing.assert_close(again, found)


def test_batch_norms_are_measured_on_the_calibration_images(scenes: Path, tmp_path: Path) -> None:
    model, data = build_student("RN-Femto-64", seed=0), calibrate(scenes, tmp_path, 32)
    model.tower.clip.visual.bn1.running_mean.fill_(7)
    recalibrate(model, data)
    images = torch.cat([image for image, _ in data.batches(model, "again")])
    with torch.no_grad():
        wanted = model.tower.clip.visual.conv1(images).mean((0, 2, 3))
    found = model.tower.clip.visual.bn1
    torch.testing.assert_close(found.running_mean, wanted, rtol=1e-4, atol=1e-5)
    assert len(images) == 32 and int(found.num_batches_tracked) == 2
