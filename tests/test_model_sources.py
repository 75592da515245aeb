# SPDX-License-Identifier: Apache-2.0
"""Where models come from: names, tags, folders, files; and what is refused."""

import json
import logging
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from kdengine import models
from kdengine.models import source

TINY = "ViT-Pico-32"


def config_of(name: str = TINY) -> dict:
    return json.loads((source.CONFIGS / f"{name}.json").read_text())


def write_config(folder: Path, **changes) -> str:
    config = config_of()
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path = folder / "student.json"
    path.write_text(json.dumps(config))
    return str(path)


def exported(folder: Path, seed: int = 0) -> str:
    one = models.build_student(TINY, seed=seed)
    return f"local-dir:{models.export_student(one.tower.state_dict(), one.spec, folder / 'out')}"


def test_nothing_is_fetched_for_random_weights(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", offline)
    path = write_config(
        tmp_path,
        vision_cfg={
            "timm_model_name": "test_resnet",
            "timm_pool": "",
            "timm_model_pretrained": True,
        },
    )
    assert models.build_student(path).spec.model_cfg["vision_cfg"]["timm_model_pretrained"]


GELU = [
    ("ViT-B-32", "openai", "use ViT-B-32-quickgelu"),
    ("ViT-B-32", "laion400m_e32", "use ViT-B-32-quickgelu"),
    ("ViT-H-14-378", "dfn5b", "use ViT-H-14-378-quickgelu"),
    ("RN50", "openai", "use RN50-quickgelu"),
    ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "use ViT-B-32$"),
]


@pytest.mark.parametrize(("name", "tag", "advice"), GELU, ids=[f"{n}-{t}" for n, t, _ in GELU])
def test_weights_of_the_other_gelu_are_refused(name, tag, advice, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: "file")
    with pytest.raises(ValueError, match=advice):
        models.build_teacher(name, tag)


def test_published_file_of_the_other_gelu_is_refused(tmp_path):
    url = open_clip.get_pretrained_url("ViT-B-32-quickgelu", "laion400m_e32")
    path = tmp_path / Path(url).name
    path.touch()
    with pytest.raises(ValueError, match="use ViT-B-32-quickgelu"):
        source.resolve("test", "ViT-B-32", str(path))


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32-quickgelu", "openai"), ("ViT-B-16", "laion400m_e32")]
)
def test_weights_of_the_right_gelu_are_taken(name, tag, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: "file")
    assert source.resolve("test", name, tag).checkpoint == "file"


def test_a_tag_brings_its_own_preprocessing_and_tokenizer(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: "file")
    spec = source.resolve("test", "ViT-B-16-SigLIP-256", "webli").spec
    assert spec.preprocess == models.PreprocessSpec(
        size=256, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="squash"
    )
    assert spec.tokenizer == "hf:timm/ViT-B-16-SigLIP:64?clean=canonicalize"


def test_failed_download_says_what_to_do(monkeypatch):
    def offline(cfg):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(RuntimeError, match="not known. Without network: .* local-dir:PATH"):
        models.build_teacher("ViT-B-16", "laion400m_e32")


def test_hub_model_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def offline(hub, filename):
        raise OSError("offline")

    monkeypatch.setattr(source, "download_pretrained_from_hf", offline)
    with pytest.raises(RuntimeError, match="could not fetch hf-hub:some/model"):
        models.build_teacher("hf-hub:some/model")


def test_hub_model_is_read_like_a_folder(tmp_path, monkeypatch):
    folder = Path(exported(tmp_path).removeprefix("local-dir:"))
    monkeypatch.setattr(
        source,
        "download_pretrained_from_hf",
        lambda hub, filename: str(folder / (filename or "open_clip_model.safetensors")),
    )
    assert models.build_teacher("hf-hub:some/model").spec.embed_dim == 32


def test_local_folder_gives_back_its_weights(tmp_path):
    name = exported(tmp_path, seed=5)
    expected = models.build_student(TINY, seed=5).tower.state_dict()
    found = models.build_student(name).tower.state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_json_configuration_with_a_checkpoint(tmp_path):
    tower = models.build_student(TINY, seed=6).tower
    save_file(tower.clip.state_dict(), tmp_path / "some.safetensors")
    found = models.build_student(write_config(tmp_path), str(tmp_path / "some.safetensors"))
    assert torch.equal(found.tower.clip.visual.proj, tower.clip.visual.proj)


def test_training_checkpoint_of_open_clip_is_read(tmp_path):
    tower = models.build_student(TINY, seed=6).tower
    state = {f"module.{k}": v for k, v in tower.clip.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "epoch_1.pt")
    found = models.build_student(TINY, str(tmp_path / "epoch_1.pt"))
    assert torch.equal(found.tower.clip.visual.proj, tower.clip.visual.proj)


def test_preferred_weight_file_wins(tmp_path):
    folder = Path(exported(tmp_path, seed=1).removeprefix("local-dir:"))
    (folder / "model.safetensors").write_bytes(b"something else")
    models.build_student(f"local-dir:{folder}")


REFUSED = [
    ("ViT-T16", None, ValueError, "^student ViT-T16: .*did you mean ViT-T-16"),
    ("/nope", None, FileNotFoundError, "^student /nope: there is no such folder"),
    ("runs/nope/export", None, FileNotFoundError, "^student runs/nope/export: there is no such"),
    (".", None, ValueError, "^student .: this is a path; a folder is given as local-dir:."),
    ("ViT-B-16", "laion400m_e99", ValueError, "neither a tag of ViT-B-16 .*laion400m_e32"),
    (TINY, "openai", ValueError, "neither a tag of ViT-Pico-32 .it has none"),
    ("local-dir:/nowhere", None, FileNotFoundError, "folder /nowhere does not exist; train"),
    ("local-dir:.", None, FileNotFoundError, "an open_clip_config.json in it"),
    ("/nowhere/student.json", None, FileNotFoundError, "no model configuration"),
    ("hf-hub:a/b", "openai", ValueError, "brings its own weights"),
]


@pytest.mark.parametrize(("model", "pretrained", "error", "match"), REFUSED, ids=lambda x: str(x))
def test_unknown_models_are_refused_with_advice(model, pretrained, error, match):
    with pytest.raises(error, match=match):
        models.build_student(model, pretrained)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ('{"embed_dim": 4}', "lacks vision_cfg, text_cfg"),
        ("[]", "lacks embed_dim"),
    ],
    ids=["syntax", "missing", "list"],
)
def test_broken_configuration_is_refused(tmp_path, text, match):
    path = tmp_path / "student.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        models.build_student(str(path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vision_cfg": {"widht": 3}}, "cannot build .*widht"),
        ({"vision_cfg": {"timm_model_name": "resnet1"}}, "cannot build .*resnet1"),
        ({"vision_cfg": {"image_size": [32, 64]}}, "only square ones"),
        ({"text_cfg": {"vocab_size": 100}}, "vocabulary of 100"),
    ],
    ids=["key", "timm", "oblong", "vocabulary"],
)
def test_unusable_configuration_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        models.build_student(write_config(tmp_path, **changes))


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / source.CONFIG_FILE).write_text(json.dumps({"model_cfg": config_of()}))
    with pytest.raises(FileNotFoundError, match="found none; for random weights"):
        models.build_student(f"local-dir:{tmp_path}")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit ViT-Pico-32"):
        models.build_student(TINY, str(tmp_path / "other.safetensors"))


def test_student_is_trained_with_the_resize_that_the_loader_does(tmp_path, caplog):
    folder = Path(exported(tmp_path).removeprefix("local-dir:"))
    config = json.loads((folder / source.CONFIG_FILE).read_text())
    config["preprocess_cfg"] |= {"resize_mode": "squash", "mean": [0.5, 0.5, 0.5]}
    (folder / source.CONFIG_FILE).write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        spec = models.build_student(f"local-dir:{folder}").spec
    assert (spec.preprocess.resize_mode, spec.preprocess.mean) == ("shortest", (0.5, 0.5, 0.5))
    assert "exported with bicubic, shortest" in caplog.text


def test_load_model_takes_a_bare_folder_in_evaluation_mode(tmp_path):
    folder = exported(tmp_path, seed=5).removeprefix("local-dir:")
    tower, spec = models.load_model(folder)
    assert not tower.training and spec.context_length == 16
    assert torch.equal(
        tower.clip.visual.proj, models.build_student(TINY, seed=5).tower.clip.visual.proj
    )


def test_load_model_refuses_random_weights():
    with pytest.raises(ValueError, match=f"^model {TINY}: it has no weights"):
        models.load_model(TINY)
