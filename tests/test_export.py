# SPDX-License-Identifier: Apache-2.0
"""An exported student is what open_clip loads, and nothing half-written ever stands there."""

import json
import sys
import types
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open

from kdengine import models
from kdengine.models import export

FILES = {"open_clip_config.json", "open_clip_model.safetensors"}
TEXTS = ["a dog runs", "two children in the snow, one with a red hat"]


def write_config(folder: Path, **changes) -> str:
    config = json.loads((Path(models.__file__).parent / "configs/ViT-Pico-32.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path = folder / "student.json"
    path.write_text(json.dumps(config))
    return str(path)


TIMM = {"timm_model_name": "test_resnet", "timm_pool": "", "image_size": 64}
KINDS = {
    "vit": {},
    "timm": {"vision_cfg": TIMM},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}},
    "custom text": {"custom_text": True},
    "quick gelu": {"quick_gelu": True},
    "sigmoid": {"init_logit_bias": -10.0},
    "context": {"text_cfg": {"context_length": 24}},
    "nonscalar": {"nonscalar_logit_scale": True},
}


@pytest.fixture
def pico() -> models.Student:
    return models.build_student("ViT-Pico-32", seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_loads_the_export_and_embeds_alike(tmp_path, kind):
    tower, spec = models.build_student(write_config(tmp_path, **KINDS[kind]), seed=0)
    out = models.export_student(tower.state_dict(), spec, tmp_path / "out")
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    image = torch.randn(2, 3, spec.preprocess.size, spec.preprocess.size)
    found = tower.eval()(image, tokens)
    clip.eval()
    assert tokens.shape == (2, spec.context_length)
    assert torch.equal(clip.encode_image(image), found.image)
    assert torch.equal(clip.encode_text(tokens), found.text)
    assert torch.equal(clip.logit_scale.exp().squeeze(), found.scale.squeeze())


@pytest.mark.parametrize("name", ["MobileNetV3-S", "ViT-T-16"])
def test_a_student_of_the_paper_makes_the_round_trip(tmp_path, name):
    tower, spec = models.build_student(name, seed=0)
    out = models.export_student(tower.clip.state_dict(), spec, tmp_path / "out")
    clip = open_clip.create_model(f"local-dir:{out}", require_pretrained=True)
    expected = tower.clip.state_dict()
    for key, value in clip.state_dict().items():
        assert torch.equal(value.squeeze(), expected[key].squeeze()), key


def test_preprocessing_travels_with_the_student(tmp_path):
    config = write_config(tmp_path)
    text = json.dumps(
        {
            "model_cfg": json.loads(Path(config).read_text()),
            "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        }
    )
    Path(config).write_text(text)
    tower, spec = models.build_student(config)
    out = models.export_student(tower.state_dict(), spec, tmp_path / "out")
    _, _, evaluation = open_clip.create_model_and_transforms(f"local-dir:{out}")
    resize, crop, normalize = evaluation.transforms[0], *evaluation.transforms[1::3]
    assert (resize.size, resize.interpolation.value, crop.size) == (32, "bicubic", (32, 32))
    assert (list(normalize.mean), list(normalize.std)) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def test_our_own_loader_reads_the_export_too(tmp_path, pico):
    out = models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    loaded = models.load_model(out)
    state = pico.tower.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.tower.state_dict().items())
    assert loaded.spec.preprocess == pico.spec.preprocess


def test_only_the_student_is_in_the_folder(tmp_path, pico):
    out = models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    with safe_open(out / "open_clip_model.safetensors", "pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
        assert file.get_tensor("logit_scale").ndim == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert names == set(pico.tower.clip.state_dict())
    assert metadata == {"format": "pt"}


def test_the_stored_scale_is_the_one_the_student_computes_with(tmp_path, pico):
    pico.tower.log_scale.data.fill_(7.0)
    out = models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    scale = open_clip.create_model(f"local-dir:{out}").logit_scale.exp()
    assert scale.item() == pytest.approx(100)


def test_weights_are_stored_in_fp32(tmp_path, pico):
    state = pico.tower.bfloat16().state_dict()
    out = models.export_student(state, pico.spec, tmp_path / "out")
    with safe_open(out / "open_clip_model.safetensors", "pt") as file:
        assert file.get_tensor("visual.proj").dtype == torch.float32


def test_shared_tensors_are_written_twice(tmp_path, pico):
    state = pico.tower.clip.state_dict()
    state["ln_final.weight"] = state["ln_final.bias"] = torch.ones(64)[::2]
    out = models.export_student(state, pico.spec, tmp_path / "out")
    loaded = models.load_model(out).tower.clip
    assert torch.equal(loaded.ln_final.bias, torch.ones(32))


def test_notes_are_kept_in_the_configuration(tmp_path, pico):
    out = models.export_student(
        pico.tower.state_dict(), pico.spec, tmp_path / "out", notes={"step": 7}
    )
    assert json.loads((out / "open_clip_config.json").read_text())["kdengine"]["step"] == 7


def damaged(state: dict, how: str) -> dict:
    state = dict(state)
    if how == "missing":
        del state["clip.visual.proj"]
    elif how == "unknown":
        state["clip.image_head.weight"] = torch.zeros(2)
    elif how == "shape":
        state["clip.visual.proj"] = torch.zeros(0)
    else:
        state["clip.visual.proj"] = torch.full((32, 32), float("nan"))
    return state


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("missing", "missing visual.proj"),
        ("unknown", "unknown image_head.weight"),
        ("shape", r"visual.proj: \(0,\), expected \(32, 32\)"),
        ("nan", "not finite: visual.proj"),
    ],
)
def test_wrong_weights_are_refused_and_nothing_is_left(tmp_path, pico, how, match):
    state = damaged(pico.tower.state_dict(), how)
    with pytest.raises(ValueError, match=match):
        models.export_student(state, pico.spec, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", ["nothing", "empty folder", "earlier export"])
def test_free_places_and_earlier_exports_are_taken(tmp_path, pico, before):
    out = tmp_path / "deep" / "out"
    if before == "empty folder":
        out.mkdir(parents=True)
    elif before == "earlier export":
        other = models.build_student("ViT-Pico-32", seed=1)
        models.export_student(other.tower.state_dict(), other.spec, out)
    models.export_student(pico.tower.state_dict(), pico.spec, out)
    assert torch.equal(models.load_model(out).tower.clip.visual.proj, pico.tower.clip.visual.proj)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("what", ["notes.txt", "open_clip_model.safetensors"])
def test_foreign_folder_is_not_touched(tmp_path, pico, what):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / what).write_text("mine")
    with pytest.raises(
        FileExistsError, match="^export: .*no export by kdengine of the same kind.*--force"
    ):
        models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    assert (tmp_path / "out" / what).read_text() == "mine"


def test_export_with_a_foreign_file_beside_it_counts_as_foreign(tmp_path, pico):
    out = models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        models.export_student(pico.tower.state_dict(), pico.spec, out)


def test_force_writes_beside_what_is_there(tmp_path, pico):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    models.export_student(pico.tower.state_dict(), pico.spec, out, force=True)
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    assert models.load_model(out).spec.embed_dim == 32


def test_a_file_in_the_way_is_refused(tmp_path, pico):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="^export: .*is a file"):
        models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out", force=True)


def test_failed_write_leaves_the_earlier_export(tmp_path, pico, monkeypatch):
    out = models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    other = models.build_student("ViT-Pico-32", seed=1)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        models.export_student(other.tower.state_dict(), other.spec, out)
    assert torch.equal(models.load_model(out).tower.clip.visual.proj, pico.tower.clip.visual.proj)
    assert list(tmp_path.iterdir()) == [out]


def test_tokenizer_files_go_with_a_hugging_face_text_tower(tmp_path, monkeypatch):
    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name):
            assert name == "org/words"
            return AutoTokenizer()

        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    package = types.ModuleType("transformers")
    package.AutoTokenizer = AutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", package)
    text = {"hf_tokenizer_name": "org/words", "tokenizer_kwargs": {"clean": "canonicalize"}}
    tower, spec = models.build_student(write_config(tmp_path, text_cfg=text))
    for _ in range(2):
        out = models.export_student(tower.state_dict(), spec, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES | {"tokenizer.json"}


def test_random_state_is_left_alone(tmp_path, pico):
    state = torch.get_rng_state()
    models.export_student(pico.tower.state_dict(), pico.spec, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
