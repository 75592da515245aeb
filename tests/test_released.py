# SPDX-License-Identifier: Apache-2.0
"""TinyCLIP's checkpoint layout: prefixes, aliases, leftovers, pickles, pruned models."""

import argparse
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from kdengine.cli import main
from kdengine.models import Student, build_student, load_model
from kdengine.models.pruning.cut import cut
from kdengine.models.pruning.ragged import install_ragged, tower_shape
from kdengine.models.pruning.released import read_released, released_student


@pytest.fixture
def student(tmp_path: Path) -> Student:
    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return build_student(str(path), seed=0)


def laid_out(weights: dict[str, Tensor], *, several: bool = False, aliases: bool = False) -> dict:
    """The tensors under TinyCLIP's names."""
    ddp, found = "module." if several else "", {}
    for name, value in weights.items():
        home = "image" if name.startswith("visual.") else "text"
        if name == "logit_scale":
            found[f"_logit_scale.{ddp}logit_scale"] = value.reshape(())
            continue
        found[f"_{home}_encoder.{ddp}{name}"] = value.half()
        if aliases:
            found[f"{home}_encoder_without_ddp.{name}"] = value.half()
    found["_image_encoder.visual.l0_module.hidden_loga"] = torch.zeros(3)
    return found


def embeddings(student: Student) -> Any:
    torch.manual_seed(0)
    image, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 49407, (2, 77))
    return student.tower.eval()(image, tokens)


@pytest.mark.parametrize("several", [False, True])
def test_a_dense_checkpoint_is_read(
    student: Student, tmp_path: Path, several: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "released.pt"
    tensors = laid_out(student.tower.clip.half().float().state_dict(), several=several)
    torch.save({"epoch": 6, "state_dict": tensors, "args": argparse.Namespace(lr=1e-4)}, path)
    found = released_student(path, str(tmp_path / "model.json"))
    assert "ragged" not in found.spec.model_cfg
    torch.testing.assert_close(embeddings(found), embeddings(student))
    words = ["convert", str(path), str(tmp_path / "out"), "--model", str(tmp_path / "model.json")]
    assert main(words) == 0
    assert "M without token embedding\nload it with open_clip" in capsys.readouterr().out
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", require_pretrained=True)
    torch.manual_seed(0)
    image, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 49407, (2, 77))
    assert torch.equal(clip.eval().encode_image(image), embeddings(found).image)
    assert torch.equal(clip.encode_text(tokens), embeddings(found).text)


def test_a_pruned_checkpoint_tells_its_sizes(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student.tower.clip.half().float()
    towers = ("image", "text")
    shapes: Any = {x: tower_shape(student.tower.clip, x) for x in towers}
    on = (torch.arange(512) % 3 > 0).float()
    factors = {"image.channels": on[:128], "text.1.neurons": on, "image.0.heads": torch.zeros(2)}
    with torch.no_grad():
        # what the released cut drops, and this one keeps, must not be there
        student.tower.clip.visual.transformer.resblocks[0].attn.out_proj.bias.zero_()
    tensors, cut_shapes = cut(student.tower.clip.state_dict(), shapes, factors)
    for tower, shape in cut_shapes.items():
        install_ragged(student.tower.clip, tower, shape)  # type: ignore[arg-type]
    student.tower.clip.load_state_dict(tensors)
    wanted = embeddings(student)
    del tensors["visual.transformer.resblocks.0.attn.out_proj.bias"]
    path = tmp_path / "auto.pt"
    torch.save({"state_dict": laid_out(tensors, aliases=True)}, path)
    words = ["convert", str(path), str(tmp_path / "out"), "--model", str(tmp_path / "model.json")]
    assert main(words) == 0
    told = capsys.readouterr().out
    total = sum(x.numel() for x in tensors.values()) + 128
    size = f"{total / 1e6:.1f} M parameters, {(total - 49408 * 128) / 1e6:.1f} M"
    assert f"{size} without token embedding\nlayers of unequal sizes" in told
    found = load_model(tmp_path / "out")
    assert set(found.spec.model_cfg["ragged"]) == {"image", "text"}
    assert tower_shape(found.tower.clip, "image") == cut_shapes["image"]
    torch.testing.assert_close(embeddings(found), wanted, rtol=1e-5, atol=1e-5)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": {}, "args": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        read_released(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


def test_what_is_no_tinyclip_is_refused(student: Student, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        read_released(tmp_path / "absent.pt")
    torch.save(student.tower.clip.state_dict(), tmp_path / "open_clip.pt")
    with pytest.raises(ValueError, match="holds no TinyCLIP"):
        read_released(tmp_path / "open_clip.pt")
    torch.save(laid_out(student.tower.clip.state_dict()), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit RN-Femto-64"):
        released_student(tmp_path / "other.pt", "RN-Femto-64")


def test_two_values_of_one_tensor_are_refused(student: Student, tmp_path: Path) -> None:
    tensors = laid_out(student.tower.clip.state_dict())
    tensors["module._text_encoder.ln_final.bias"] = torch.ones(128).bfloat16()
    torch.save(tensors, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="ln_final.bias is there twice"):
        read_released(tmp_path / "twice.pt")
