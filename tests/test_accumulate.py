# SPDX-License-Identifier: Apache-2.0
"""A step in micro-batches is the step of all pairs at once: gradients, random draws, statistics."""

import copy
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdengine.accumulate import Accumulation
from kdengine.centres import Drawn, Targets, read_assigned
from kdengine.data.clusters import STORED
from kdengine.methods import Clip, ClipCID, ClipKD, Distillation, Embeddings, Method, joined
from kdengine.models import Features, build_student

K, SIZE, WIDTH = 4, 3, 16
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


class Engine:
    """What a training engine does to a step of one process: nothing."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.boundaries: list[bool] = []

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.boundaries.append(boundary)


class Teachers:
    """Stored features of two teachers, which count how often they are asked."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths, self.calls = widths, 0

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Features, ...]:
        self.calls += 1
        return tuple(
            Features(batch[f"u{width}"], batch[f"v{width}"], torch.tensor(40.0 + width))
            for width in self.widths
        )


def build(folder: Path, vision: dict[str, Any], method: Method) -> Distillation:
    """A tiny student in float64, in training mode, with a method on top."""
    path = folder / "student.json"
    path.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": TEXT}))
    root = Distillation(build_student(str(path)).tower, method).double()
    # a fresh tower's biases are zero, which hides what does not reach them
    for parameter in root.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return root.train()


def micro_batches(num: int, size: int = SIZE) -> list[dict[str, Tensor]]:
    """Random pairs, and what teachers of the widths 16 and 12 say of them."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(num):
        tokens = torch.randint(1, 49000, (size, 8), generator=draw)
        tokens[:, -1] = 49407
        image = torch.randn(size, 3, 32, 32, generator=draw, dtype=torch.float64)
        batch = {"image": image, "tokens": tokens}
        for name in ("u16", "v16", "u12", "v12"):
            shape = (size, int(name[1:]))
            batch[name] = torch.randn(shape, generator=draw, dtype=torch.float64)
        batch["cluster_nearest"] = torch.rand(size, 9, generator=draw).argsort(1)[:, :3]
        batch["cluster"] = batch["cluster_nearest"][:, 0]
        batch["cluster_cosine"] = torch.rand(size, 3, generator=draw, dtype=torch.float64)
        batch["cluster_lse"] = torch.full((size,), 6.0, dtype=torch.float64)
        made.append(batch)
    return made


class Clusters:
    """Nine clusters, all of them in every step."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(4)
        self.centres = torch.randn(9, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()

    def draw(self, batches: Sequence[dict[str, Tensor]]) -> Drawn:
        assert all(set(batch) == set(STORED) for batch in batches)
        return Drawn(self.centres, None, read_assigned(batches, Targets(3, 5.0)))


def step(
    root: Distillation,
    teachers: Any,
    batches: list[dict[str, Tensor]],
    clusters: Clusters | None = None,
) -> Tensor:
    """A step of ``Accumulation``, whose loss has an upstream gradient that is not 1."""
    draw = clusters.draw if clusters else None
    passes = Accumulation(Engine(root), teachers, len(batches), draw)
    loss, _ = passes.forward(iter(batches).__next__, False)
    passes.backward(1.5 * loss)
    return loss.detach()


def whole(
    root: Distillation,
    teachers: Any,
    batches: list[dict[str, Tensor]],
    clusters: Clusters | None = None,
) -> Tensor:
    """The same with the graphs of all micro-batches at once, in plain autograd."""
    own = [root(batch["image"], batch["tokens"], only_embed=True) for batch in batches]
    embeddings = joined(own)
    scale = root.student.clip(None, None)[2]
    together = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    masked = embeddings.image if root.method.mask_all else embeddings.masked
    student = Features(embeddings.image, embeddings.text, scale)
    told = [{name: batch[name] for name in STORED} for batch in batches]
    more = {"drawn": clusters.draw(told)} if clusters else {}
    terms = root.method(student, teachers(together) if teachers else (), masked, **more)
    loss = sum(weight * terms[name] for name, weight in root.method.weights.items())
    (1.5 * loss).backward()
    return loss.detach()


KD = {"task": 1.0, "crd": 0.7, "fd": 5.0, "icl": 0.5, "gd": 30.0, "afd": 0.4}
METHODS = {
    "clip": (lambda: Clip(), ()),
    "clip-kd": (lambda: ClipKD(WIDTH, [16], **KD), (16,)),
    "heads": (lambda: ClipKD(WIDTH, [12], **KD), (12,)),
    "masked": (lambda: ClipKD(WIDTH, [12], **KD, mask_ratio=0.5), (12,)),
    "masked-alone": (
        lambda: ClipKD(WIDTH, [12], task=0, crd=0, icl=0, fd=1.0, mask_ratio=0.5),
        (12,),
    ),
    "all-masked": (lambda: ClipKD(WIDTH, [12], **KD, mask_ratio=0.5, mask_all=True), (12,)),
    "two-teachers": (lambda: ClipKD(WIDTH, [16, 12], **KD), (16, 12)),
    "clusters": (lambda: ClipCID(WIDTH, positives=2), (16,)),
    "as-released": (lambda: ClipKD(WIDTH, [16], **KD, reference_quirks=True), (16,)),
}
# masks and dropped patches exclude each other
VISIONS = {"clip": VIT | {"patch_dropout": 0.5}, "two-teachers": VIT | {"patch_dropout": 0.5}}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_all_graphs_at_once(name: str, tmp_path: Path) -> None:
    method, widths = METHODS[name]
    root = build(tmp_path, VISIONS.get(name, VIT), method())
    other, batches = copy.deepcopy(root), micro_batches(K)
    teachers = Teachers(widths) if widths else None
    ours, theirs = (Clusters() if name == "clusters" else None for _ in range(2))
    torch.manual_seed(5)
    loss = step(root, teachers, batches, ours)
    after = torch.rand(4)
    torch.manual_seed(5)
    expected = whole(other, Teachers(widths) if widths else None, batches, theirs)
    # the step leaves the generator where its draws have brought it
    assert torch.equal(after, torch.rand(4))
    assert teachers is None or teachers.calls == K
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (key, x), y in zip(root.named_parameters(), other.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), key
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12, msg=key)
    if ours and theirs:
        torch.testing.assert_close(ours.centres.grad, theirs.centres.grad, rtol=1e-9, atol=1e-12)


def test_another_mask_in_the_replay_would_be_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    """Of the test above: gradients do depend on the random state."""
    method, widths = METHODS["masked"]
    root = build(tmp_path, VIT, method())
    other, batches = copy.deepcopy(root), micro_batches(K)
    step(root, Teachers(widths), batches)
    monkeypatch.setattr("kdengine.checkpoint.set_random_state", lambda state: None)
    step(other, Teachers(widths), batches)
    first, second = (x.student.clip.visual.conv1.weight.grad for x in (root, other))
    assert (first - second).norm() > 1e-3 * first.norm()


def test_one_micro_batch_takes_one_pass_and_no_boundary(tmp_path: Path) -> None:
    root = build(tmp_path, VIT, Clip())
    engine, calls = Engine(root), []
    root.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    passes = Accumulation(engine, None, 1)
    loss, _ = passes.forward(iter(micro_batches(1)).__next__, False)
    passes.backward(loss)
    assert calls == [True] and engine.boundaries == []


def test_the_last_backward_pass_alone_is_a_boundary(tmp_path: Path) -> None:
    root = build(tmp_path, VIT, Clip())
    engine, calls = Engine(root), []
    root.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    backward = engine.backward
    at: list[bool] = []
    engine.backward = lambda loss: (  # type: ignore[method-assign]
        at.append(engine.boundaries[-1]),
        backward(loss),
    )
    passes = Accumulation(engine, None, K)
    loss, _ = passes.forward(iter(micro_batches(K)).__next__, False)
    passes.backward(loss)
    assert at == [False] * (K - 1) + [True]
    # K - 1 without a graph, one for the loss, K - 1 replays
    assert calls == [False] * (K - 1) + [True] * K


def test_running_statistics_see_each_micro_batch_once_and_in_order(tmp_path: Path) -> None:
    root = build(tmp_path, RESNET, Clip())
    other, batches = copy.deepcopy(root), micro_batches(K)
    step(root, None, batches)
    whole(other, None, batches)
    buffers = dict(root.named_buffers())
    counts = [x.item() for name, x in buffers.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {K}
    for name, expected in other.named_buffers():
        torch.testing.assert_close(buffers[name], expected, rtol=1e-12, atol=1e-14, msg=name)
    for x, y in zip(root.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-11)


class Kept:
    """A tensor that a graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Live:
    """Bytes of tensors that graphs hold, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Kept:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.now, self.most)
        # a node that saves its own output must not hold itself
        kept = Kept(tensor.detach())
        weakref.finalize(kept, self.drop, size)
        return kept

    def drop(self, size: int) -> None:
        self.now -= size


def peak(root: Distillation, num: int, take: Callable[..., Tensor] = step) -> int:
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.keep, lambda kept: kept.tensor):
        take(root, Teachers((12,)), micro_batches(num))
    assert live.now == 0
    return live.most


def test_activations_do_not_grow_with_the_number_of_micro_batches(tmp_path: Path) -> None:
    root = build(tmp_path, VIT, ClipKD(WIDTH, [12], **KD, mask_ratio=0.5))
    one, two, many = (peak(root, num) for num in (1, 2, 16))
    print(one, two, many)
    # what the losses keep of 14 more micro-batches: rows of some tens of times the widths
    rows, row = 14 * SIZE, 8 * (WIDTH + 12)
    assert many - two < 50 * rows * row, (one, two, many)
    assert many < 1.2 * one, (one, two, many)
    assert peak(root, 16, whole) > 5 * one


def test_embeddings_of_all_parts_are_joined_in_order() -> None:
    parts = [Embeddings(torch.full((2, 3), float(i)), torch.ones(2, 3), None) for i in range(3)]
    found = joined(parts)
    assert found.image[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and found.masked is None
