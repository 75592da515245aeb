# SPDX-License-Identifier: Apache-2.0
"""ComKD-CLIP's two methods against the oracle, and what PromptKD is of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import config, reference
from kdengine.methods import ComKD, ComKDTeacher, build_method, build_root
from kdengine.models import Features, Student, Teacher, build_student
from kdengine.models.graft import grafted, prompted
from kdengine.models.prompted import PromptShape
from kdengine.teachers import ClassTeacher

SHAPE = PromptShape(tokens=2, depth=2)
WIDE, NARROW, BATCH = 24, 16, 6


def model(folder: Path, name: str, width: int, image_size: int = 32) -> Student:
    vision = {"image_size": image_size, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path = folder / f"{name}.json"
    values = {"embed_dim": width, "vision_cfg": {**vision, "patch_size": 16}, "text_cfg": text}
    path.write_text(json.dumps(values))
    return build_student(str(path), seed=len(name))


def class_tokens(num_classes: int) -> Tensor:
    tokens = torch.randint(1000, 40000, (num_classes, 8))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return tokens


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    whole = model(tmp_path, "teacher", WIDE)
    made = prompted(whole, {"image": SHAPE, "text": SHAPE}, torch.tensor([7, 8]), seed=1)
    with torch.no_grad():
        made.tower.log_scale.fill_(2.2)
    return Teacher(made.tower, made.spec)


class Case:
    """A student, its teacher over some classes, and a batch."""

    def __init__(self, folder: Path, teacher: Teacher, num_classes: int, attention: bool) -> None:
        self.tokens = class_tokens(num_classes)
        keys = num_classes if attention else 0
        plain = model(folder, "student", NARROW)
        self.student = grafted(plain, teacher, SHAPE, num_keys=keys, seed=2)
        self.guide = ClassTeacher(teacher, self.student.spec, self.tokens)
        self.bridge: Any = self.student.tower.clip.visual.bridge  # type: ignore[union-attr]
        if attention:
            self.bridge.attention.texts.copy_(self.guide.texts)
        self.image = torch.randn(BATCH, 3, 32, 32)
        self.label = torch.randint(0, num_classes, (BATCH,))

    def terms(self, method: ComKD) -> dict[str, Tensor]:
        batch = {"image": self.image}
        return method(self.student.tower, self.image, self.label, self.guide(batch))


@pytest.fixture
def case(tmp_path: Path, teacher: Teacher) -> Case:
    return Case(tmp_path, teacher, 5, True)


def expected_kl(case: Case, temperature: float = 1.0) -> Tensor:
    _, fused = case.student.tower.bridged_image(case.image)
    (guide,) = case.guide({"image": case.image})
    unit = [F.normalize(x.double(), dim=1) for x in (fused, guide.text, guide.image)]
    own = case.student.tower.log_scale.exp().double()
    teacher = (unit[2], unit[1], guide.scale.double())
    return reference.logit_kl(unit[0], unit[1], own, *teacher, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_terms_are_the_oracles_each_side_with_its_own_scale(case: Case, temperature: float) -> None:
    with torch.no_grad():
        case.bridge.attention.gate.fill_(0.4)
    terms = case.terms(ComKD(temperature=temperature))
    torch.testing.assert_close(
        terms["kl"].double(), expected_kl(case, temperature), rtol=1e-4, atol=1e-6
    )
    unit, _ = case.student.tower.bridged_image(case.image)
    (guide,) = case.guide({"image": case.image})
    align = reference.moment_alignment(unit.double(), F.normalize(guide.image, dim=1).double())
    torch.testing.assert_close(terms["align"].double(), align, rtol=1e-5, atol=1e-7)
    assert float(terms["gate"]) == pytest.approx(0.4)
    assert guide.scale.item() == pytest.approx(torch.tensor(2.2).exp().item())


@pytest.mark.parametrize("num_classes", [3, 10, 40])
def test_published_reduction_is_the_released_arithmetic_and_weighs_an_image_by_1000_over_n(
    tmp_path: Path, teacher: Teacher, num_classes: int
) -> None:
    case = Case(tmp_path, teacher, num_classes, False)
    published = ComKD(kl=1000.0, kl_reduction="mean", align=0.0)
    term = 1000.0 * case.terms(published)["kl_mean"]
    _, fused = case.student.tower.bridged_image(case.image)
    (guide,) = case.guide({"image": case.image})
    student = case.student.tower.log_scale.exp() * F.normalize(fused, dim=1) @ guide.text.T
    logits = guide.scale * F.normalize(guide.image, dim=1) @ guide.text.T
    released = F.kl_div(student.log_softmax(1), logits.softmax(1), reduction="sum")
    released = 1000.0 * released / student.numel()
    torch.testing.assert_close(term, released, rtol=1e-4, atol=1e-5)
    # of an image, times N: whatever N
    torch.testing.assert_close(
        term * num_classes / 1000, case.terms(ComKD(align=0.0))["kl"], rtol=1e-5, atol=1e-7
    )


def test_a_gate_of_zero_is_promptkd_to_the_bit(tmp_path: Path, teacher: Teacher) -> None:
    whole, plain = (Case(tmp_path, teacher, 5, attention) for attention in (True, False))
    assert whole.bridge.attention is not None and plain.bridge.attention is None
    plain.student.tower.load_state_dict(whole.student.tower.state_dict(), strict=False)
    method = ComKD(align=0.0)
    values, gradients = [], []
    for case in (whole, plain):
        case.image, case.guide = whole.image, whole.guide
        term = case.terms(method)["kl"]
        term.backward()
        values.append(term.detach())
        own = dict(case.student.tower.named_parameters())
        gradients.append({n: p.grad for n, p in own.items() if "attention" not in n})
    assert torch.equal(*values)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other), name
    # only the gate learns in the first step
    attention = whole.bridge.attention
    assert attention.gate.grad.abs() > 0 and not attention.value.weight.grad.any()


def test_no_gradient_reaches_a_teacher_or_a_frozen_weight(case: Case, teacher: Teacher) -> None:
    terms = case.terms(ComKD())
    (terms["kl"] + terms["align"]).backward()
    assert all(p.grad is None for p in teacher.tower.parameters())
    for name, value in case.student.tower.clip.named_parameters():
        learned = name == "visual.transformer.prompts" or name.startswith("visual.bridge.")
        assert (value.grad is not None) == learned, name


def test_loss_does_not_depend_on_the_order_of_classes(case: Case) -> None:
    with torch.no_grad():
        case.bridge.attention.gate.fill_(0.7)
    before = case.terms(ComKD())
    order = torch.randperm(5)
    case.guide.texts = case.guide.texts[order]
    case.bridge.attention.texts.copy_(case.guide.texts)
    after = case.terms(ComKD())
    for name in ("kl", "align"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_labels_are_not_looked_at(case: Case) -> None:
    before = case.terms(ComKD())["kl"]
    case.label = torch.full_like(case.label, -1)
    assert torch.equal(case.terms(ComKD())["kl"], before)


def test_texts_are_encoded_once_unless_asked(
    case: Case, teacher: Teacher, monkeypatch: Any
) -> None:
    calls = []
    encode = Teacher.encode_text

    def counted(self: Teacher, tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return encode(self, tokens)

    monkeypatch.setattr(Teacher, "encode_text", counted)
    again = ClassTeacher(teacher, case.student.spec, case.tokens, recompute=True)
    once = ClassTeacher(teacher, case.student.spec, case.tokens)
    assert calls == [5, 5]
    told = [guide({"image": case.image}) for guide in (once, once, again, again)]
    assert calls == [5] * 4
    assert all(torch.equal(x[0].text, told[0][0].text) for x in told)
    assert "encoded in each step" in again.rows()["teacher"]
    assert again.tokenizers() == {} and again.views() == {}


def test_a_teacher_of_another_size_sees_the_same_crop_in_its_own_size(
    tmp_path: Path, teacher: Teacher, case: Case
) -> None:
    large = model(tmp_path, "student-large", NARROW, image_size=48)
    guide = ClassTeacher(teacher, large.spec, case.tokens)
    assert [view.size for view in guide.views().values()] == [32]
    (found,) = guide({"image": torch.zeros(1, 3, 48, 48), "teacher_image": case.image})
    torch.testing.assert_close(found.image, teacher.encode_image(case.image))


def test_stage_one_is_cross_entropy_over_the_texts_of_all_classes(tmp_path: Path) -> None:
    tokens, label = class_tokens(4), torch.tensor([0, 3, 3, 1, 2, 0])
    whole = model(tmp_path, "teacher", WIDE)
    made = prompted(whole, {"image": SHAPE, "text": SHAPE}, torch.tensor([7, 8]), seed=1)
    image = torch.randn(BATCH, 3, 32, 32)
    method = ComKDTeacher(tokens)
    root = build_root(made.tower, method)
    loss, told = root(image, label)
    found = made.tower(image, tokens)
    logits = found.scale * F.normalize(found.image, dim=1) @ F.normalize(found.text, dim=1).T
    torch.testing.assert_close(loss, F.cross_entropy(logits, label), rtol=1e-4, atol=1e-6)
    assert float(told["accuracy"]) == pytest.approx(float((logits.argmax(1) == label).sum()) / 6)
    assert not method.state_dict()
    loss.backward()
    for tower in (made.tower.clip.visual.transformer, made.tower.clip.transformer):
        assert tower.prompts.grad.abs().max() > 0  # type: ignore[union-attr]


def test_the_configuration_reaches_the_method() -> None:
    own = config.ComKD(kl=7.0, kl_reduction="mean", temperature=2.0, align=0.0)
    method = build_method(
        config.Method(name="comkd", comkd=own), student_width=WIDE, teacher_widths=[WIDE]
    )
    assert isinstance(method, ComKD)
    assert method.weights == {"kl_mean": 7.0} and method.temperature == 2.0
    with pytest.raises(ValueError, match="every weight is 0"):
        ComKD(kl=0.0, align=0.0)


def test_features_of_a_class_teacher_are_what_methods_take(case: Case) -> None:
    (found,) = case.guide({"image": case.image})
    assert isinstance(found, Features)
    assert found.image.shape == (BATCH, WIDE) and found.text.shape == (5, WIDE)
    assert not found.image.is_inference() and not found.text.is_inference()
