# SPDX-License-Identifier: Apache-2.0
"""Weight inheritance: which layers, which units, which slices; what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdengine.models import build_student, student_configs
from kdengine.models.pruning.inherit import inherit, layer_map, student_spec, unit_scores
from kdengine.models.towers import Student

# total, image, text without token embedding, token embedding: papers' table of configurations
COUNTS = {
    "TinyCLIP-ViT-61M-32-Text-29M": (115.38, 61.41, 28.67, 25.30),
    "TinyCLIP-ViT-40M-32-Text-19M": (84.21, 39.69, 19.22, 25.30),
    "TinyCLIP-ViT-39M-16-Text-19M": (83.10, 38.59, 19.22, 25.30),
    "TinyCLIP-ViT-8M-16-Text-3M": (23.45, 8.28, 2.52, 12.65),
    "TinyCLIP-ResNet-30M-Text-29M": (83.82, 29.58, 28.94, 25.30),
    "TinyCLIP-ResNet-19M-Text-19M": (63.37, 18.60, 19.48, 25.30),
}


def config(layers: int, width: int, text_layers: int, text_heads: int, **over: Any) -> dict:
    vision = {"image_size": 32, "layers": layers, "width": width, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64 * text_heads}
    text |= {"heads": text_heads, "layers": text_layers}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **over}


def resnet(width: int, layers: tuple[int, ...], text_layers: int) -> dict:
    found = config(1, 64, text_layers, 1)
    vision = {"image_size": 32, "layers": list(layers), "width": width, "patch_size": None}
    return {**found, "vision_cfg": vision}


@pytest.fixture
def build(tmp_path: Path):
    def make(values: dict, seed: int = 0) -> Student:
        path = tmp_path / "model.json"
        path.write_text(json.dumps(values))
        found = build_student(str(path), seed=seed)
        # nothing may be equal by being 0 or 1
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in found.tower.state_dict().values():
                if value.is_floating_point():
                    value.normal_(std=0.1)
        return found

    return make


@pytest.mark.parametrize("name", COUNTS)
def test_configurations_have_the_published_sizes(name: str) -> None:
    assert name in student_configs()
    with torch.device("meta"):
        clip = build_student(name).tower.clip
    sizes = {key: value.numel() for key, value in clip.named_parameters()}
    image = sum(size for key, size in sizes.items() if key.startswith("visual."))
    tokens = sizes["token_embedding.weight"]
    text = sum(sizes.values()) - image - tokens - 1
    found = [sum(sizes.values()), image, text, tokens]
    assert found == pytest.approx([1e6 * x for x in COUNTS[name]], abs=6e3)


def test_released_rule_of_depth() -> None:
    assert layer_map(12, 6, "front") == [0, 2, 4, 6, 8, 10]
    assert layer_map(12, 3, "front") == [0, 4, 8]
    assert layer_map(6, 3, "front") == [0, 2, 4]
    for teacher, student in ((12, 9), (9, 6), (12, 10), (12, 8)):
        assert layer_map(teacher, student, "front") == list(range(student))


def test_even_depth_spans_the_teacher() -> None:
    assert layer_map(12, 9, "even") == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    for teacher in range(2, 14):
        for student in range(2, teacher + 1):
            found = layer_map(teacher, student, "even")
            assert found[0] == 0 and found[-1] == teacher - 1
            steps = {b - a for a, b in zip(found, found[1:], strict=False)}
            assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert layer_map(5, 1, "even") == [0]


def test_front_keeps_leading_slices_and_whole_heads(build) -> None:
    teacher, student = build(config(6, 192, 4, 3)), build(config(3, 128, 2, 2), seed=1)
    found = inherit(teacher, student).tensors
    given = teacher.tower.clip.state_dict()
    block = "visual.transformer.resblocks"
    whole = given[f"{block}.4.attn.in_proj_weight"].view(3, 3, 64, 192)
    wanted = whole[:, :2, :, :128].reshape(3 * 128, 128)
    assert torch.equal(found[f"{block}.2.attn.in_proj_weight"], wanted)
    out = given[f"{block}.2.attn.out_proj.weight"][:128, :128]
    assert torch.equal(found[f"{block}.1.attn.out_proj.weight"], out)
    neurons = given["transformer.resblocks.2.mlp.c_fc.weight"][:512, :128]
    assert torch.equal(found["transformer.resblocks.1.mlp.c_fc.weight"], neurons)
    assert torch.equal(found["token_embedding.weight"], given["token_embedding.weight"][:, :128])
    assert torch.equal(found["text_projection"], given["text_projection"][:128])
    assert torch.equal(found["logit_scale"], given["logit_scale"])


def test_every_tensor_is_filled_once_and_told(build) -> None:
    teacher, student = build(config(6, 192, 4, 3)), build(config(3, 128, 2, 2), seed=1)
    found = inherit(teacher, student)
    wanted = student.tower.clip.state_dict()
    assert {k: v.shape for k, v in found.tensors.items()} == {k: v.shape for k, v in wanted.items()}
    student.tower.clip.load_state_dict(found.tensors)
    told = [fate.name for fate in found.fates if fate.fate != "left"]
    assert sorted(told) == sorted(wanted)
    left = {fate.source for fate in found.fates if fate.fate == "left"}
    taken = {fate.source for fate in found.fates if fate.fate != "left"}
    assert left | taken == set(teacher.tower.clip.state_dict()) and not left & taken
    assert {fate.fate for fate in found.fates if "mlp.c_fc.weight" in fate.name} == {"sliced"}


def test_same_size_is_a_copy(build) -> None:
    teacher, student = build(config(3, 128, 2, 2)), build(config(3, 128, 2, 2), seed=1)
    found = inherit(teacher, student, depth="even")
    assert {fate.fate for fate in found.fates} == {"kept"}
    student.tower.clip.load_state_dict(found.tensors)
    image, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 8))
    ours, theirs = student.tower.eval()(image, tokens), teacher.tower.eval()(image, tokens)
    assert torch.equal(ours.image, theirs.image) and torch.equal(ours.text, theirs.text)


class Shuffled(torch.nn.Module):
    """A model whose state dict comes in the order of its names as text: block 10 before 2."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(sorted(self.clip.state_dict(*args, **kwargs).items()))


def test_order_of_the_names_does_not_matter(build) -> None:
    teacher, student = build(config(12, 64, 12, 1)), build(config(6, 64, 3, 1), seed=1)
    wanted = inherit(teacher, student).tensors
    teacher.tower.clip = Shuffled(teacher.tower.clip)
    found = inherit(teacher, student).tensors
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_resnet_shapes_of_the_released_student() -> None:
    teacher, student = (
        build_student("RN50", seed=0),
        build_student("TinyCLIP-ResNet-19M-Text-19M", seed=0),
    )
    found = inherit(teacher, student).tensors
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes["visual.conv1.weight"] == (22, 3, 3, 3)
    assert shapes["visual.layer1.0.conv3.weight"] == (176, 44, 1, 1)
    assert shapes["visual.layer4.2.conv3.weight"] == (1408, 352, 1, 1)
    assert shapes["visual.attnpool.positional_embedding"] == (50, 1408)
    assert shapes["visual.attnpool.c_proj.weight"] == (1024, 1408)
    name = "visual.layer2.0.downsample.0.weight"
    assert torch.equal(found[name], teacher.tower.clip.state_dict()[name][:352, :176])
    student.tower.clip.load_state_dict(found)


def test_scores_choose_units_in_their_order(build) -> None:
    teacher, student = build(config(2, 192, 2, 3)), build(config(2, 128, 2, 2), seed=1)
    weights = teacher.tower.clip.state_dict()
    squares = {name: value**2 for name, value in weights.items() if value.dim()}
    scores = unit_scores(weights, teacher.spec, squares)
    scores["image.1.heads"] = torch.tensor([1.0, 0.0, 2.0])
    found = inherit(teacher, student, scores=scores).tensors
    name = "visual.transformer.resblocks.1.attn.in_proj_bias"
    assert torch.equal(found[name], weights[name].view(3, 3, 64)[:, [0, 2]].flatten())
    # one choice of channels for the whole tower
    channels = scores["image.channels"].topk(128).indices.sort().values
    assert torch.equal(found["visual.proj"], weights["visual.proj"][channels])
    ln = "visual.transformer.resblocks.0.ln_1.weight"
    assert torch.equal(found[ln], weights[ln][channels])


@pytest.mark.parametrize("values", [config(2, 128, 2, 2), resnet(64, (1, 2, 1, 1), 1)])
def test_scores_are_the_derivative_by_a_gate(build, values: dict) -> None:
    model = build(values)
    tower, groups = model.tower.double().eval(), {}
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.abs_()
    image, tokens = torch.randn(3, 3, 32, 32).double(), torch.randint(1, 100, (3, 8))
    weigh = torch.randn(3, 16).double()

    def loss() -> Tensor:
        found = tower(image, tokens)
        return (found.image * weigh).sum() + (found.text * weigh).sum()

    hooks = []

    def gate(group: str, module: Any, width: int, before: bool) -> None:
        """Multiply what a module gives, or takes, by a factor a unit: the definition."""
        if group not in groups:
            size = module.in_features if before else module.num_features
            groups[group] = torch.ones(size // width, dtype=torch.float64, requires_grad=True)
        factor = groups[group].repeat_interleave(width)

        def scaled(x: Tensor) -> Tensor:
            return x * (factor.view(-1, 1, 1) if x.dim() == 4 else factor)

        if before:
            hooks.append(module.register_forward_pre_hook(lambda _, x: (scaled(x[0]),)))
        else:
            hooks.append(module.register_forward_hook(lambda _, __, y: scaled(y)))

    if "visual.layer1.0.conv1.weight" in tower.clip.state_dict():
        block = tower.clip.visual.layer2[0]
        gate("image.2.0.first", block.bn1, 1, before=False)
        gate("image.2.0.second", block.bn2, 1, before=False)
        gate("image.1.channels", tower.clip.visual.layer1[0].bn3, 1, before=False)
        gate("image.1.channels", tower.clip.visual.layer1[0].downsample[2], 1, before=False)
    else:
        mlp = tower.clip.transformer.resblocks[1].mlp
        gate("text.1.neurons", mlp.c_proj, 1, before=True)
        gate("image.0.neurons", tower.clip.visual.transformer.resblocks[0].mlp.c_proj, 1, True)
    by_gate = dict(zip(groups, torch.autograd.grad(loss(), list(groups.values())), strict=True))
    for hook in hooks:
        hook.remove()
    loss().backward()
    gradients = {
        name: p * p.grad for name, p in tower.clip.named_parameters() if p.grad is not None
    }
    scores = unit_scores(tower.clip.state_dict(), model.spec, gradients)
    for group, wanted in by_gate.items():
        torch.testing.assert_close(scores[group], wanted, rtol=1e-8, atol=1e-13)


def test_activation_mean_and_std_are_the_teachers(build) -> None:
    teacher, student = build(config(2, 64, 2, 1, quick_gelu=True)), build(config(2, 64, 2, 1))
    seen = dataclasses.replace(teacher.spec.preprocess, mean=(0.5, 0.5, 0.5))
    found = student_spec(student.spec, dataclasses.replace(teacher.spec, preprocess=seen))
    assert found.model_cfg["quick_gelu"] is True
    assert found.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config(3, 64, 2, 1), "take a shallower student"),
        (config(2, 192, 2, 1), "no smaller number of units"),
        ({**config(2, 64, 2, 1), "embed_dim": 8}, "is never cut"),
        (resnet(64, (1, 1, 1, 1), 2), "has no source"),
    ],
)
def test_what_does_not_fit_is_refused(build, values: dict, message: str) -> None:
    teacher = build(config(2, 128, 2, 2))
    with pytest.raises(ValueError, match=message):
        inherit(teacher, build(values))


def test_other_heads_are_refused(build) -> None:
    values = config(2, 64, 2, 1)
    values["vision_cfg"]["head_width"] = 32
    with pytest.raises(ValueError, match="heads are kept whole"):
        inherit(build(config(2, 128, 2, 2)), build(values))


def test_timm_towers_are_refused() -> None:
    swin = build_student("Swin-T", seed=0)
    with pytest.raises(ValueError, match="the towers that can be cut"):
        inherit(swin, swin)
