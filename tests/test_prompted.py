# SPDX-License-Identifier: Apache-2.0
"""Prompts in frozen towers, the bridge into a teacher's space, and the rule for its keys."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.models import Student, Teacher, build_student, export_student, load_model
from kdengine.models.bridge import Bridge, EduAttention
from kdengine.models.graft import grafted, prompted
from kdengine.models.prompted import PromptShape, install_prompts, start_from_words

SHAPE = PromptShape(tokens=2, depth=2)
WORDS = torch.tensor([320, 1125])
CLASSES, WIDE, NARROW = 5, 24, 16


def model(folder: Path, name: str, width: int, **options: Any) -> Student:
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    values = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text, **options}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    found = build_student(str(path), seed=0)
    with torch.no_grad():
        for value in found.tower.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return found


@pytest.fixture
def plain(tmp_path: Path) -> Student:
    return model(tmp_path, "plain", NARROW)


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    """With prompts in both towers, and a GELU of its own."""
    whole = model(tmp_path, "teacher", WIDE, quick_gelu=True)
    made = prompted(whole, {"image": SHAPE, "text": SHAPE}, WORDS, seed=1)
    return Teacher(made.tower, made.spec)


@pytest.fixture
def student(plain: Student, teacher: Teacher) -> Student:
    return grafted(plain, teacher, SHAPE, num_keys=CLASSES, seed=2)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1000, 40000, (rows, 8))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return torch.randn(rows, 3, 32, 32), tokens


def by_hand(transformer: Any, x: Tensor, mask: Tensor | None, in_front: bool) -> Tensor:
    """Prompts as the papers draw them: replaced before each of the first layers."""
    depth, size, _ = transformer.prompts.shape
    for number, block in enumerate(transformer.resblocks):
        if number < depth and (in_front or number):
            x = x.clone()
            where = slice(1, 1 + size) if in_front else slice(x.shape[1] - size, None)
            x[:, where] = transformer.prompts[number]
        x = block(x, attn_mask=mask)
    return x


def test_image_prompts_stand_behind_the_patches_and_are_replaced_in_each_layer(
    plain: Student,
) -> None:
    clip: Any = plain.tower.clip
    image, _ = batch()
    install_prompts(clip, "image", SHAPE)
    visual = clip.visual
    patches = visual.conv1(image).flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(4, 1, -1)
    x = torch.cat([start, patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, visual.transformer.prompts[0].expand(4, -1, -1)], 1))
    x = by_hand(visual.transformer, x, None, False)
    expected = visual.ln_post(x)[:, 0] @ visual.proj
    torch.testing.assert_close(plain.tower.encode_image(image), expected)


def test_text_prompts_stand_where_the_words_of_the_template_do(plain: Student) -> None:
    clip: Any = plain.tower.clip
    _, tokens = batch()
    install_prompts(clip, "text", SHAPE)
    x = clip.token_embedding(tokens) + clip.positional_embedding
    x = clip.ln_final(by_hand(clip.transformer, x, clip.attn_mask, True))
    expected = x[torch.arange(4), tokens.argmax(1)] @ clip.text_projection
    torch.testing.assert_close(plain.tower.encode_text(tokens), expected)
    # and nothing is left of the words that they stand in for
    other = tokens.clone()
    other[:, 1:3] = 7
    assert torch.equal(plain.tower.encode_text(other), plain.tower.encode_text(tokens))


def test_text_prompts_of_one_layer_that_start_from_words_change_nothing(plain: Student) -> None:
    _, tokens = batch()
    tokens[:, 1:3] = WORDS
    before = plain.tower.encode_text(tokens)
    install_prompts(plain.tower.clip, "text", PromptShape(tokens=2, depth=1))
    assert (plain.tower.encode_text(tokens) - before).abs().max() > 1e-3
    start_from_words(plain.tower.clip, WORDS)
    torch.testing.assert_close(plain.tower.encode_text(tokens), before)


def test_a_custom_text_tower_takes_prompts_too(tmp_path: Path) -> None:
    student = model(tmp_path, "custom", NARROW, custom_text=True)
    _, tokens = batch()
    tokens[:, 1:3] = WORDS
    before = student.tower.encode_text(tokens)
    made = prompted(student, {"text": PromptShape(tokens=2, depth=1)}, WORDS, seed=0)
    torch.testing.assert_close(made.tower.encode_text(tokens), before)


def test_every_tensor_keeps_its_name(plain: Student, student: Student, teacher: Teacher) -> None:
    names = set(plain.tower.clip.state_dict())
    added = set(teacher.tower.clip.state_dict()) - names
    assert added == {"visual.transformer.prompts", "transformer.prompts"}
    added = set(student.tower.clip.state_dict()) - names - added
    assert added and all(name.startswith("visual.bridge.") for name in added)
    assert names <= set(student.tower.clip.state_dict())


def test_only_prompts_and_bridge_are_trained(plain: Student, student: Student) -> None:
    image, tokens = batch()
    made = prompted(plain, {"image": SHAPE, "text": SHAPE}, WORDS, seed=0)
    for one, expected in (
        (made, ("transformer.prompts",)),
        (student, ("visual.transformer.prompts", "visual.bridge.")),
    ):
        found = one.tower(image, tokens)
        (found.image.square().sum() + found.text.square().sum()).backward()
        learned = {n for n, p in one.tower.clip.named_parameters() if p.grad is not None}
        wanted = {
            name
            for name, _ in one.tower.clip.named_parameters()
            if any(name == part or part in name for part in expected)
        }
        if one is student:
            # the prompts in its text tower are its teacher's
            wanted.discard("transformer.prompts")
        assert learned == wanted and learned


def test_a_grafted_student_is_its_towers_behind_a_bridge(
    plain: Student, student: Student, teacher: Teacher
) -> None:
    image, tokens = batch()
    clip: Any = student.tower.clip
    assert torch.equal(student.tower.encode_text(tokens), teacher.encode_text(tokens))
    own = copy.deepcopy(plain.tower)
    install_prompts(own.clip, "image", SHAPE)
    own.clip.visual.transformer.prompts = clip.visual.transformer.prompts  # type: ignore
    unit = F.normalize(clip.visual.bridge.projector(own.encode_image(image)), dim=1)
    student.tower.train()
    torch.testing.assert_close(student.tower.encode_image(image), unit)
    found = student.tower(image, tokens)
    assert found.image.shape == (4, WIDE)
    torch.testing.assert_close(found.scale, plain.tower.log_scale.exp())


def test_an_export_holds_prompts_bridge_and_keys(student: Student, tmp_path: Path) -> None:
    image, tokens = batch()
    bridge: Any = student.tower.clip.visual.bridge
    with torch.no_grad():
        bridge.attention.gate.fill_(0.5)
        bridge.attention.texts.copy_(F.normalize(torch.randn(CLASSES, WIDE), dim=1))
    student.tower(image, tokens)
    student.tower.eval()
    wanted = student.tower(image, tokens)
    out = export_student(student.tower.clip.state_dict(), student.spec, tmp_path / "export")
    loaded = load_model(out)
    found = loaded.tower(image, tokens)
    torch.testing.assert_close(found.image, wanted.image)
    torch.testing.assert_close(found.text, wanted.text)
    assert loaded.spec.embed_dim == WIDE
    with pytest.raises(Exception, match="prompts|bridge|unexpected"):
        open_clip.create_model(f"local-dir:{out}")


def test_a_gate_of_zero_leaves_the_embedding_bit_equal_and_only_itself_to_learn() -> None:
    attention = EduAttention(WIDE, CLASSES)
    attention.texts.copy_(F.normalize(torch.randn(CLASSES, WIDE), dim=1))
    unit = F.normalize(torch.randn(6, WIDE), dim=1)
    found = attention(unit)
    assert torch.equal(found, unit)
    (found * torch.randn(6, WIDE)).sum().backward()
    assert attention.gate.grad is not None and attention.gate.grad.abs() > 1e-3
    for layer in (attention.query, attention.key, attention.value):
        assert layer.weight.grad is not None and not layer.weight.grad.any()


@pytest.mark.parametrize("divisor", [None, 0.7])
def test_attention_is_its_formula(divisor: float | None) -> None:
    attention = EduAttention(WIDE, CLASSES, divisor).double()
    attention.texts.copy_(F.normalize(torch.randn(CLASSES, WIDE), dim=1))
    with torch.no_grad():
        attention.gate.fill_(-0.3)
    unit = F.normalize(torch.randn(6, WIDE, dtype=torch.float64), dim=1)
    rows = []
    for u in unit:
        weights = torch.stack(
            [
                attention.query(u) @ attention.key(w) / (divisor or WIDE**0.5)
                for w in attention.texts
            ]
        ).exp()
        mixed = sum(a * attention.value(w) for a, w in zip(weights, attention.texts, strict=True))
        rows.append(u - 0.3 * mixed / weights.sum())
    torch.testing.assert_close(attention(unit), torch.stack(rows))


def test_attention_does_not_depend_on_the_order_of_classes() -> None:
    attention = EduAttention(WIDE, CLASSES).double()
    attention.texts.copy_(torch.randn(CLASSES, WIDE))
    with torch.no_grad():
        attention.gate.fill_(1.0)
    unit = F.normalize(torch.randn(6, WIDE, dtype=torch.float64), dim=1)
    before = attention(unit)
    attention.texts.copy_(attention.texts[torch.randperm(CLASSES)])
    torch.testing.assert_close(attention(unit), before, rtol=1e-12, atol=1e-13)


def test_keys_are_those_of_the_training_whatever_classes_compete(student: Student) -> None:
    """With other keys an image would have another embedding; a list of candidates gives none."""
    image, tokens = batch()
    attention: Any = student.tower.clip.visual.bridge.attention  # type: ignore[union-attr]
    with torch.no_grad():
        attention.gate.fill_(1.0)
        attention.texts.copy_(F.normalize(torch.randn(CLASSES, WIDE), dim=1))
    student.tower.eval()
    everyone = student.tower(image, tokens).image
    few = student.tower(image, tokens[:2]).image
    assert torch.equal(everyone, few)
    attention.texts[3:] = 0
    assert (student.tower(image, tokens).image - everyone).abs().max() > 1e-3


def test_without_keys_a_bridge_is_its_projector() -> None:
    torch.manual_seed(3)
    plain = Bridge(NARROW, WIDE, 0)
    torch.manual_seed(3)
    whole = Bridge(NARROW, WIDE, CLASSES)
    features = torch.randn(6, NARROW)
    assert plain.attention is None
    assert torch.equal(plain(features), whole(features))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pool_type": "avg"}, "the image tower .VisionTransformer. is no transformer"),
        ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, "image tower .ModifiedResNet."),
    ],
    ids=["pools all", "resnet"],
)
def test_a_tower_that_takes_no_prompts_is_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path = tmp_path / "model.json"
    vision = {**vision, **change}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    with pytest.raises(ValueError, match=match):
        install_prompts(build_student(str(path), seed=0).tower.clip, "image", SHAPE)


def test_more_layers_with_prompts_than_layers_are_refused(plain: Student) -> None:
    with pytest.raises(ValueError, match="has 3 layers, fewer than the 4"):
        install_prompts(plain.tower.clip, "text", PromptShape(tokens=1, depth=4))
    with pytest.raises(ValueError, match="at least one token"):
        PromptShape(tokens=0, depth=1)


def test_prompts_go_into_a_plain_model_only(student: Student, teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="has prompts, bridge of its own"):
        grafted(student, teacher, SHAPE, num_keys=2, seed=0)
    cut = dataclasses.replace(student.spec, model_cfg={"ragged": {}})
    with pytest.raises(ValueError, match="has ragged of its own"):
        prompted(Student(student.tower, cut), {"text": SHAPE}, WORDS, seed=0)
