# SPDX-License-Identifier: Apache-2.0
"""Ragged towers: equal to open_clip's, gates, and the cut that changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdengine.models import Student, build_from_spec, build_student, export_student, load_model
from kdengine.models.pruning.cut import cut
from kdengine.models.pruning.ragged import (
    GatedLinear,
    GatedNorm,
    Gates,
    RaggedShape,
    install_ragged,
    tower_shape,
)

LAYERS, WIDTH, HEADS = 3, 128, 2
TOWERS = ("image", "text")


@pytest.fixture
def student(tmp_path: Path) -> Student:
    """A ViT with weights that are neither 0 nor 1."""
    vision = {"image_size": 32, "layers": LAYERS, "width": WIDTH, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": WIDTH}
    values = {"embed_dim": 16, "vision_cfg": vision}
    values |= {"text_cfg": {**text, "heads": HEADS, "layers": LAYERS}}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values))
    found = build_student(str(path), seed=0)
    with torch.no_grad():
        for value in found.tower.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return found


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32, dtype=dtype), torch.randint(1, 49407, (4, 8))


def ragged(student: Student) -> tuple[Any, dict[str, Gates]]:
    """The same model in ragged blocks, float64, and its gates."""
    tower = copy.deepcopy(student.tower)
    weights = tower.clip.state_dict()
    gates = {x: install_ragged(tower.clip, x, tower_shape(tower.clip, x)) for x in TOWERS}
    tower.clip.load_state_dict(weights)
    return tower.double().eval(), gates


def random_factors(seed: int, soft: bool = True) -> dict[str, Tensor]:
    """Some units off, the others soft; one layer without heads, one without neurons."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        values = torch.rand(size, generator=generator, dtype=torch.float64)
        on = (values > 0.3).double()
        return on * (0.1 + 0.9 * values) if soft else on

    found = {}
    for tower in TOWERS:
        found[f"{tower}.channels"] = draw(WIDTH)
        for n in range(LAYERS):
            found[f"{tower}.{n}.heads"] = draw(HEADS)
            found[f"{tower}.{n}.neurons"] = draw(4 * WIDTH)
        found[f"{tower}.1.heads"] = torch.zeros(HEADS, dtype=torch.float64)
        found[f"{tower}.2.neurons"] = torch.zeros(4 * WIDTH, dtype=torch.float64)
    return found


def set_gates(gates: dict[str, Gates], factors: dict[str, Tensor]) -> None:
    for tower, own in gates.items():
        own.channels = factors[f"{tower}.channels"]
        own.heads = [factors[f"{tower}.{n}.heads"] for n in range(LAYERS)]
        own.neurons = [factors[f"{tower}.{n}.neurons"] for n in range(LAYERS)]


def close(found: Any, wanted: Any, tolerance: float) -> None:
    torch.testing.assert_close(found[:2], wanted[:2], rtol=tolerance, atol=tolerance)


def test_equal_to_the_blocks_of_open_clip(student: Student) -> None:
    tower, gates = ragged(student)
    image, tokens = batch()
    wanted = student.tower.double().eval()(image, tokens)
    close(tower(image, tokens), wanted, 1e-12)
    ones = {name: torch.ones_like(x) for name, x in random_factors(0).items()}
    set_gates(gates, ones)
    close(tower(image, tokens), wanted, 1e-12)
    ours, theirs = tower.clip.state_dict(), student.tower.clip.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("soft", [True, False])
def test_the_cut_computes_what_the_gated_model_did(student: Student, soft: bool) -> None:
    tower, gates = ragged(student)
    factors = random_factors(1, soft)
    set_gates(gates, factors)
    image, tokens = batch()
    wanted = tower(image, tokens)
    shapes = {x: tower_shape(tower.clip, x) for x in TOWERS}
    tensors, cut_shapes = cut(tower.clip.state_dict(), shapes, factors)
    assert cut_shapes["image"].heads[1] == 0 and cut_shapes["text"].neurons[2] == 0
    assert cut_shapes["image"].width == int((factors["image.channels"] != 0).sum())
    dense = copy.deepcopy(student.tower)
    for name, shape in cut_shapes.items():
        install_ragged(dense.clip, name, shape)
    dense.double().clip.load_state_dict(tensors)
    close(dense.eval()(image, tokens), wanted, 1e-11)
    assert {x: tower_shape(dense.clip, x) for x in TOWERS} == cut_shapes


def test_a_second_cut_starts_from_a_ragged_tower(student: Student) -> None:
    tower, gates = ragged(student)
    factors = random_factors(1)
    shapes = {x: tower_shape(tower.clip, x) for x in TOWERS}
    tensors, shapes = cut(tower.clip.state_dict(), shapes, factors)
    gates = {x: install_ragged(tower.clip, x, shapes[x]) for x in TOWERS}
    tower.double().clip.load_state_dict(tensors)
    image, tokens = batch()
    half = torch.ones(shapes["image"].width, dtype=torch.float64)
    half[::2] = 0
    gates["image"].channels = half
    wanted = tower(image, tokens)
    tensors, shapes = cut(tower.clip.state_dict(), shapes, {"image.channels": half})
    gates["image"].clear()
    install_ragged(tower.clip, "image", shapes["image"])
    tower.double().clip.load_state_dict(tensors)
    close(tower(image, tokens), wanted, 1e-11)


def test_no_gradient_reaches_channels_through_a_norm_and_dead_ones_stay_out(
    student: Student,
) -> None:
    tower, gates = ragged(student)
    factors = random_factors(2)
    set_gates(gates, factors)
    image, tokens = batch()
    channels = factors["image.channels"].clone().requires_grad_()
    gates["image"].channels = channels
    norm = tower.clip.visual.transformer.resblocks[0].ln_1
    # what a dead channel holds does not matter
    stream = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    alive = channels != 0
    leaves = (stream, norm.weight, norm.bias)
    out, wanted = norm(stream), torch.zeros_like(stream)
    wanted[..., alive] = torch.nn.functional.layer_norm(
        stream[..., alive], (int(alive.sum()),), norm.weight[alive], norm.bias[alive], norm.eps
    )
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (*leaves, channels), upstream, allow_unused=True)
    gradients = torch.autograd.grad(wanted, leaves, upstream)
    torch.testing.assert_close(found[:3], gradients, rtol=1e-12, atol=1e-12)
    assert found[3] is None
    (gradient,) = torch.autograd.grad(tower(image, tokens).image.sum(), channels)
    assert (gradient[alive] != 0).all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_norm_over_some_channels_is_as_exact_as_one_over_all(offset: float) -> None:
    gates = Gates()
    norm = GatedNorm(WIDTH, 1e-5, gates)
    gates.channels = (torch.rand(WIDTH) > 0.7).float()
    alive = gates.channels != 0
    stream = torch.randn(64, WIDTH) + offset
    width = (int(alive.sum()),)
    truth = torch.nn.functional.layer_norm(stream[:, alive].double(), width)
    plain = torch.nn.functional.layer_norm(stream[:, alive], width)
    allowed = 2 * (plain - truth).abs().max() + 1e-6
    assert (norm(stream)[:, alive] - truth).abs().max() <= allowed


def test_factors_of_a_linear_layer_are_those_of_its_inputs_and_outputs() -> None:
    layer = GatedLinear(5, 3).double()
    x, inputs, outputs = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5), (5,), (3,))
    )
    leaves = (x, inputs, outputs, layer.weight, layer.bias)
    wanted = torch.nn.functional.linear(x * inputs, layer.weight, layer.bias) * outputs
    found = layer(x, inputs, outputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_gated_tower_compiles_without_a_break(student: Student) -> None:
    tower, gates = ragged(student)
    factors = random_factors(3)
    set_gates(gates, factors)
    for module, given in zip((tower.encode_image, tower.encode_text), batch(), strict=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(given), module(given))


def test_a_ragged_student_survives_export(student: Student, tmp_path: Path) -> None:
    tower, _ = ragged(student)
    shapes = {x: tower_shape(tower.clip, x) for x in TOWERS}
    tensors, cut_shapes = cut(student.tower.clip.state_dict(), shapes, random_factors(4))
    ragged_cfg = {name: shape.to_dict() for name, shape in cut_shapes.items()}
    config = {**student.spec.model_cfg, "ragged": ragged_cfg}
    spec = type(student.spec).from_dict({**student.spec.to_dict(), "model_cfg": config})
    made = build_from_spec(spec)
    made.clip.load_state_dict(tensors)
    folder = export_student(made.state_dict(), spec, tmp_path / "out")
    loaded = load_model(folder)
    image, tokens = batch(torch.float32)
    close(loaded.tower(image, tokens), made.eval()(image, tokens), 1e-6)
    assert tower_shape(loaded.tower.clip, "text") == cut_shapes["text"]


def test_random_ragged_towers_can_be_trained(student: Student) -> None:
    shape = RaggedShape(width=96, head_width=64, heads=(1, 0, 2), neurons=(10, 20, 0))
    config = {**student.spec.model_cfg, "ragged": {"image": shape.to_dict()}}
    spec = type(student.spec).from_dict({**student.spec.to_dict(), "model_cfg": config})
    tower = build_from_spec(spec)
    image, tokens = batch(torch.float32)
    found = tower(image, tokens)
    found.image.square().sum().backward()
    parameters = dict(tower.clip.visual.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    assert parameters["transformer.resblocks.1.attn.out_proj.bias"].shape == (96,)
    assert "transformer.resblocks.1.ln_1.weight" not in parameters


def test_towers_that_cannot_be_ragged_are_refused() -> None:
    shape = RaggedShape(width=8, head_width=8, heads=(1,), neurons=(4,))
    for name in ("RN-Femto-64", "Swin-T"):
        with pytest.raises(ValueError, match="image tower is no transformer"):
            install_ragged(build_student(name, seed=0).tower.clip, "image", shape)
    with pytest.raises(ValueError, match="one number of heads"):
        RaggedShape(width=8, head_width=8, heads=(1,), neurons=())


def test_a_tower_keeps_a_channel(student: Student) -> None:
    tower, _ = ragged(student)
    shapes = {x: tower_shape(tower.clip, x) for x in TOWERS}
    with pytest.raises(ValueError, match="no channel left"):
        cut(tower.clip.state_dict(), shapes, {"text.channels": torch.zeros(WIDTH)})
    with pytest.raises(ValueError, match="3 factors came"):
        cut(tower.clip.state_dict(), shapes, {"text.channels": torch.ones(3)})
