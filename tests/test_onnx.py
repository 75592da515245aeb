# SPDX-License-Identifier: Apache-2.0
"""The ONNX graphs of a model compute what torch does, at any batch size, and say what they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdengine.cli import main
from kdengine.models import Student, build_from_spec, build_student, export_student
from kdengine.models import onnx as graphs

VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
UNEVEN = {"width": 24, "head_width": 16, "heads": [1, 0, 2], "neurons": [9, 7, 0]}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "init_logit_bias": -10.0},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}},
    "timm": {
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "", "image_size": 32},
        "text_cfg": {**TEXT, "layers": 1},
        "custom_text": True,
    },
    "ragged": {"vision_cfg": VIT, "ragged": {"image": UNEVEN, "text": UNEVEN}},
}
BIAS = {"vit": -10.0}


def make(folder: Path, kind: str) -> Student:
    """A student of a kind, with weights that are neither 0 nor 1."""
    values = {"embed_dim": 16, "text_cfg": {**TEXT, "layers": 1}} | KINDS[kind]
    ragged = values.pop("ragged", None)
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(values | ({"text_cfg": TEXT} if ragged else {})))
    found = build_student(str(path), seed=0)
    if ragged:
        config = {**found.spec.model_cfg, "ragged": ragged}
        spec = dataclasses.replace(found.spec, model_cfg=config)
        found = Student(build_from_spec(spec), spec)
    with torch.no_grad():
        for value in found.tower.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return found


def unit_features(path: Path, name: str, given: Tensor) -> Tensor:
    """What onnxruntime makes of it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run([f"{name}_features"], {name: given.numpy()})
    return torch.from_numpy(found)


def props(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_what_torch_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    student, folder, out = make(tmp_path, kind), tmp_path / "export", tmp_path / "out"
    notes = {"run": "runs/mine", "step": 7}
    export_student(student.tower.state_dict(), student.spec, folder, notes=notes)
    assert main(["onnx", str(folder), str(out)]) == 0
    told = capsys.readouterr().out
    assert f"wrote {out}, opset 18: " in told and "M without token embedding\n" in told
    tower = student.tower.eval()
    for size in (1, 3, 5):
        image, tokens = torch.randn(size, 3, 32, 32), torch.randint(1, 49407, (size, 12))
        for file, name, given, encode in (
            ("visual.onnx", "image", image, tower.encode_image),
            ("textual.onnx", "text", tokens, tower.encode_text),
        ):
            assert f"{file}: " in told
            found = unit_features(out / file, name, given)
            assert found.shape == (size, 16)
            with torch.no_grad():
                wanted = F.normalize(encode(given), dim=-1)
            assert (found - wanted).norm(dim=-1).max() <= 1e-4
    for file in ("visual.onnx", "textual.onnx"):
        says = props(out / file)
        scale = float(student.tower.log_scale.exp().detach())
        assert float(says["logit_scale"]) == pytest.approx(scale)
        assert float(says.get("logit_bias", 0)) == pytest.approx(BIAS.get(kind, 0), abs=0.3)
        assert (says["model"], says["run"], says["step"]) == (student.spec.name, "runs/mine", "7")
        assert (says["image_size"], says["context_length"], says["embed_dim"]) == ("32", "12", "16")
        assert says["image_mean"] == "0.48145466 0.4578275 0.40821073"
        assert says["tokenizer"] == "simple:12" and "unit length" in says["features"]
        graph = onnx.load(out / file)
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
        # nothing of the machine that wrote it
        assert str(Path(graphs.__file__).parents[1]).encode() not in graph.SerializeToString()
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["kdengine"]["files"] == ["open_clip_config.json", "textual.onnx", "visual.onnx"]
    assert open_clip.get_tokenizer(f"local-dir:{out}")(["a dog runs"]).shape == (1, 12)


def test_what_cannot_be_read_or_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, folder = make(tmp_path, "vit"), tmp_path / "export"
    export_student(student.tower.state_dict(), student.spec, folder)
    before = sorted(path.name for path in folder.iterdir())
    # an export of weights is not taken for an earlier one of graphs
    assert main(["onnx", str(folder), str(folder)]) == 2
    assert "no export by kdengine of the same kind (with visual.onnx)" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before
    assert main(["onnx", str(tmp_path / "absent"), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith(f"error: onnx: {tmp_path / 'absent'} does not exist")


def test_without_its_packages_it_says_how_to_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name != "onnx" else object())
    assert main(["onnx", "ViT-Pico-32@some", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: onnx: onnxscript and onnxruntime cannot be imported; install what kdengine does "
        "not need otherwise: pip install onnx onnxscript onnxruntime\n"
    )


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    class Drifts(nn.Module):
        """Not the same when it is called again."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls * torch.linspace(0, 0.01, x.shape[-1])

    student = make(tmp_path, "vit")
    student.tower.clip.visual.ln_post = Drifts()
    with pytest.raises(RuntimeError, match="visual.onnx .* off torch's features"):
        graphs.export_onnx(student, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["vit.json"]
