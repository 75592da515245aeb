# SPDX-License-Identifier: Apache-2.0
"""Students and teachers: sizes, features, refusals."""

import copy
import functools
import json
import logging
import math
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from kdengine import models
from kdengine.models import source
from kdengine.models.towers import LOG_SCALE_MAX

TINY = "ViT-Pico-32"

# CLIP-KD, table 2: parameters in millions, of the text tower without the token embedding
PAPER = {
    "ViT-T-16": (5.6, 21.3, 512),
    "MobileViT-S": (5.3, 21.3, 512),
    "Swin-T": (27.9, 21.3, 512),
    "ResNet-18": (11.4, 21.3, 512),
    "MobileNetV3-S": (2.0, 21.3, 512),
    "EfficientNet-B0": (4.7, 21.3, 512),
    "RN50": (38.3, 37.8, 1024),
}


@functools.cache
def student(name: str) -> models.Student:
    return models.build_student(name, seed=0)


def batch(size: int = 32, context: int = 16, num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(num, 3, size, size, generator=generator)
    return image, torch.randint(1, 49000, (num, context), generator=generator)


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


@pytest.mark.parametrize("name", PAPER)
def test_paper_student_has_the_size_of_the_table(name):
    vision, text, width = PAPER[name]
    clip = student(name).tower.clip
    assert round(sum(p.numel() for p in clip.visual.parameters()) / 1e6, 1) == vision
    assert round(sum(p.numel() for p in clip.transformer.parameters()) / 1e6, 1) == text
    assert student(name).spec.embed_dim == width


@pytest.mark.parametrize("name", models.student_configs())
def test_shipped_student_embeds_both_modalities_in_its_width(name):
    tower, spec = student(name)
    image, tokens = batch(spec.preprocess.size, spec.context_length, num=1)
    with torch.no_grad():
        features = tower.eval()(image, tokens)
    assert features.image.shape == features.text.shape == (1, spec.embed_dim)


def test_a_name_shared_with_open_clip_means_the_same_model():
    shared = set(models.student_configs()) & set(open_clip.list_models())
    assert shared == {"RN50"}
    assert config_of("RN50") == open_clip.get_model_config("RN50")


def test_every_paper_student_is_shipped():
    assert set(PAPER) <= set(models.student_configs())


def test_student_has_no_parameter_without_dimensions():
    assert all(p.ndim > 0 for p in student(TINY).tower.parameters())
    assert student(TINY).tower.log_scale.shape == (1,)


def test_features_are_those_of_open_clip_before_normalisation(tmp_path):
    clip = open_clip.create_model(exported(tmp_path))
    image, tokens = batch()
    found = student(TINY).tower.eval()(image, tokens)
    expected = clip.eval()(image, tokens)
    assert not torch.allclose(found.image.norm(dim=1), torch.ones(4), atol=0.1)
    for raw, unit in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(nn.functional.normalize(raw, dim=-1), unit)
    torch.testing.assert_close(found.scale.squeeze(), expected[2])


def test_one_modality_alone_gives_the_same_embedding():
    tower = student(TINY).tower.eval()
    image, tokens = batch()
    both = tower(image, tokens)
    torch.testing.assert_close(tower.encode_image(image), both.image)
    torch.testing.assert_close(tower.encode_text(tokens), both.text)


def test_every_call_enters_the_forward_of_the_open_clip_module():
    """ZeRO-3 brings the parameters that a module owns itself only around its own forward."""
    tower = copy.deepcopy(student(TINY).tower)
    entered = []
    tower.clip.register_forward_pre_hook(lambda *_: entered.append(True))
    image, tokens = batch()
    tower(image, tokens), tower.encode_image(image), tower.encode_text(tokens)
    assert len(entered) == 3


@pytest.mark.parametrize(
    ("log_scale", "scale"), [(10.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))], ids=str
)
def test_student_scale_is_clamped_in_forward(log_scale, scale):
    tower = copy.deepcopy(student(TINY).tower)
    tower.log_scale.data.fill_(log_scale)
    found = tower(*batch()).scale
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(scale)
    assert tower.log_scale.item() == log_scale


def test_images_follow_the_dtype_of_the_weights():
    tower = copy.deepcopy(student(TINY).tower).bfloat16()
    assert tower(*batch()).image.dtype == torch.bfloat16


def test_a_seed_fixes_the_weights_whatever_was_drawn_before():
    first = models.build_student(TINY, seed=3).tower.state_dict()
    torch.rand(7)
    second = models.build_student(TINY, seed=3).tower.state_dict()
    other = models.build_student(TINY, seed=4).tower.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["clip.visual.proj"], other["clip.visual.proj"])


def test_building_a_teacher_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    models.build_teacher(TINY, allow_random=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_changes_no_gradient():
    plain = copy.deepcopy(student(TINY).tower).train()
    saving = models.build_student(TINY, seed=0, grad_checkpointing=True).tower
    for tower in (plain, saving):
        features = tower(*batch())
        (features.image.sum() + features.text.square().sum()).backward()
    assert saving.clip.transformer.grad_checkpointing
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_gradient_checkpointing_warns_where_a_tower_cannot(caplog):
    with caplog.at_level(logging.WARNING):
        models.build_student("RN-Nano-64", grad_checkpointing=True)
    assert "has no gradient checkpointing" in caplog.text


def test_gradient_checkpointing_that_timm_refuses_is_an_error(tmp_path, monkeypatch):
    def refuse(self, enable=True):
        raise NotImplementedError("not here")

    import timm

    monkeypatch.setattr(timm.models.resnet.ResNet, "set_grad_checkpointing", refuse)
    path = write_config(tmp_path, vision_cfg={"timm_model_name": "test_resnet", "timm_pool": ""})
    with pytest.raises(ValueError, match="switch grad_checkpointing off"):
        models.build_student(path, grad_checkpointing=True)


def test_teacher_features_are_constants_that_autograd_may_save():
    teacher = models.build_teacher(TINY, allow_random=True)
    weight = torch.ones(4, 32, requires_grad=True)
    found = teacher(*batch())
    (weight * found.image * found.scale).sum().backward()
    torch.testing.assert_close(weight.grad, found.image * found.scale)
    assert not any(x.requires_grad or x.is_inference() for x in found)


def test_teacher_is_frozen_and_in_evaluation_mode():
    teacher = models.build_teacher("RN-Nano-64", allow_random=True)
    before = copy.deepcopy(teacher.tower.state_dict())
    teacher(*batch(64, 32))
    assert not any(p.requires_grad for p in teacher.tower.parameters())
    assert not teacher.tower.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.tower.state_dict().items())


@pytest.mark.parametrize("name", ["ViT-Nano-64", "RN-Nano-64"])
def test_bf16_teacher_stays_close_and_keeps_norm_statistics(name):
    exact = models.build_teacher(name, allow_random=True)
    for key, value in exact.tower.state_dict().items():
        if "running_var" in key:
            value.uniform_(0.5, 2)
    rounded = models.Teacher(copy.deepcopy(exact.tower), exact.spec, torch.bfloat16)
    pair = batch(64, 32)
    for a, b in zip(exact(*pair)[:2], rounded(*pair)[:2], strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.cosine_similarity(a, b.float()).min() > 0.999
    assert torch.equal(rounded(*pair).scale, exact(*pair).scale)
    expected = exact.tower.state_dict()
    for key, value in rounded.tower.state_dict().items():
        if "running_" in key:
            assert torch.equal(value, expected[key])


def test_teacher_without_weights_is_refused():
    with pytest.raises(ValueError, match="^teacher ViT-Pico-32: without pretrained it is random"):
        models.build_teacher(TINY)


def test_teacher_scale_stays_as_it_was_trained(tmp_path):
    path = write_config(tmp_path, init_logit_scale=math.log(150), init_logit_bias=-10.0)
    scale = models.build_teacher(path, allow_random=True)(*batch()).scale
    assert scale.item() == pytest.approx(150)


def test_bias_of_a_sigmoid_student_is_frozen(tmp_path):
    tower, _ = models.build_student(write_config(tmp_path, init_logit_bias=-10.0))
    frozen = [name for name, p in tower.named_parameters() if not p.requires_grad]
    assert frozen == ["clip.logit_bias"]


def test_custom_text_model_is_supported(tmp_path):
    tower, spec = models.build_student(write_config(tmp_path, custom_text=True))
    assert isinstance(tower.clip, open_clip.CustomTextCLIP)
    assert tower(*batch()).text.shape == (4, spec.embed_dim)


def coca(folder: Path) -> str:
    tokens = {"output_tokens": True}
    path = write_config(
        folder,
        custom_text=True,
        vision_cfg={"attentional_pool": True, "attn_pooler_heads": 2, **tokens},
        text_cfg={"embed_cls": True, "context_length": 15, **tokens},
    )
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(config | {"multimodal_cfg": decoder}))
    return path


def test_coca_model_can_teach(tmp_path):
    teacher = models.build_teacher(coca(tmp_path), allow_random=True)
    features = teacher(*batch(context=15))
    assert features.image.shape == features.text.shape == (4, 32)


def test_coca_model_cannot_learn(tmp_path):
    with pytest.raises(ValueError, match="CoCa models can be teachers"):
        models.build_student(coca(tmp_path))


def test_tower_refuses_what_is_not_an_open_clip_model():
    with pytest.raises(TypeError, match="open_clip.create_model"):
        models.TwoTower(nn.Linear(2, 2))


def test_spec_survives_json():
    spec = student("ResNet-18").spec
    assert models.TowerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_spec_of_another_version_is_refused():
    values = student(TINY).spec.to_dict()
    values["colour"] = values.pop("name")
    with pytest.raises(ValueError, match=r"missing \['name'\], unknown \['colour'\]"):
        models.TowerSpec.from_dict(values)


def test_model_from_spec_takes_the_state_dict():
    one = models.build_student(TINY, seed=8)
    rebuilt = models.build_from_spec(one.spec)
    rebuilt.load_state_dict(one.tower.state_dict())
    assert rebuilt.log_scale.shape == (1,) and rebuilt.clip.log_scale_max == LOG_SCALE_MAX


@pytest.mark.parametrize(
    ("values", "match"),
    [({"size": 0}, "at least 1"), ({"std": (0.0, 1, 1)}, "positive"), ({"mean": (1.0,)}, "3")],
    ids=["size", "std", "mean"],
)
def test_impossible_preprocessing_is_refused(values, match):
    with pytest.raises(ValueError, match=match):
        models.PreprocessSpec(**values)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ({}, "ViT-B-16", "simple:77"),
        ({"context_length": 32, "vocab_size": 49408}, "x", "simple:32"),
        ({"hf_tokenizer_name": "roberta-base"}, "x", "hf:roberta-base:77"),
        ({"hf_tokenizer_name": "roberta-base"}, "local-dir:/a/b", "hf:/a/b:77"),
        (
            {
                "hf_tokenizer_name": "bert-base-uncased",
                "context_length": 32,
                "tokenizer_kwargs": {"strip_sep_token": True},
            },
            "x",
            "hf:bert-base-uncased:32?strip_sep_token=true",
        ),
    ],
    ids=["default", "context", "hub", "folder", "options"],
)
def test_tokenizer_id(text, name, expected):
    assert models.tokenizer_id({"text_cfg": text}, name) == expected
