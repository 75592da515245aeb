# SPDX-License-Identifier: Apache-2.0
"""ClipLoss and DistillClipLoss against open_clip.loss: values and gradients, W = 1 and 2."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from open_clip import loss as open_clip_loss
from torch import Tensor, nn

import kdengine

MODES = {"F,F": (False, False), "F,T": (False, True), "T,T": (True, True)}
NAMES = ["ClipLoss", "DistillClipLoss"]
ROWS, WIDTH, TEACHER_WIDTH = 12, 16, 24


def batch(world_size: int) -> dict[str, Tensor]:
    torch.manual_seed(5)
    rows = world_size * ROWS
    widths = {
        "image": WIDTH,
        "text": WIDTH,
        "dist_image": TEACHER_WIDTH,
        "dist_text": TEACHER_WIDTH,
    }
    return {name: F.normalize(torch.randn(rows, d), dim=1) for name, d in widths.items()}


def evaluate(loss: nn.Module, name: str, rank: int, world_size: int) -> list[Tensor]:
    """Values, then the gradients of image, text and scale of a weighted sum of the values."""
    own = {k: x.tensor_split(world_size)[rank].clone() for k, x in batch(world_size).items()}
    leaves = [own["image"].requires_grad_(), own["text"].requires_grad_()]
    leaves.append(torch.tensor(14.3, requires_grad=True))
    teacher = [own["dist_image"], own["dist_text"], torch.tensor(60.0)]
    values = loss(*leaves, *(teacher if name == "DistillClipLoss" else []))
    values = values if isinstance(values, tuple) else (values,)
    total = sum(w * x for w, x in zip((1.7, 0.6), values, strict=False))
    return [torch.stack(values).detach(), *torch.autograd.grad(total, leaves)]


def both(rank: int, world_size: int) -> dict:
    """What this engine and open_clip give on one rank, for every loss and setting."""
    found = {}
    for name in NAMES:
        for mode, (local_loss, gather_with_grad) in MODES.items():
            for home in (kdengine, open_clip_loss):
                loss = getattr(home, name)(
                    local_loss=local_loss,
                    gather_with_grad=gather_with_grad,
                    rank=rank,
                    world_size=world_size,
                )
                result = evaluate(loss, name, rank, world_size)
                found.setdefault((name, mode), []).append(result)
    return found


_RESULTS: dict[int, list[dict]] = {}


@pytest.fixture
def ranks(run_ranks):
    """What each rank found; one process start for two ranks, none for one."""

    def results(world_size: int) -> list[dict]:
        if world_size not in _RESULTS:
            _RESULTS[world_size] = []  # what a failed start leaves
            _RESULTS[world_size] = run_ranks(both, world_size) if world_size > 1 else [both(0, 1)]
        return _RESULTS[world_size] or pytest.fail("the ranks failed in an earlier test")

    return results


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_open_clips(ranks, name: str, mode: str, world_size: int) -> None:
    for result in ranks(world_size):
        for ours, theirs in zip(*result[name, mode], strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_over_two_ranks_differ_as_documented(ranks, name: str) -> None:
    first, second = ranks(2)
    ours = {mode: (first[name, mode][0], second[name, mode][0]) for mode in MODES}
    for rank in range(2):
        torch.testing.assert_close(ours["F,F"][rank][0], ours["F,T"][rank][0])
        torch.testing.assert_close(2 * ours["F,F"][rank][1], ours["F,T"][rank][1])
        torch.testing.assert_close(ours["F,T"][rank][1], ours["T,T"][rank][1])
    mean = torch.stack([values for values, *_ in ours["T,T"]]).mean(0)
    torch.testing.assert_close(mean, ours["F,F"][0][0])


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_call_have_open_clips_arguments(name: str) -> None:
    for method in ("__init__", "forward"):
        ours, theirs = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(home, method)).parameters.values()
            ]
            for home in (getattr(kdengine, name), getattr(open_clip_loss, name))
        )
        assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_output_dict_has_open_clips_names(name: str) -> None:
    data = batch(1)
    student = [data["image"], data["text"], 14.3]
    teacher = [data["dist_image"], data["dist_text"], 60.0] if name == "DistillClipLoss" else []
    ours = getattr(kdengine, name)()(*student, *teacher, output_dict=True)
    theirs = getattr(open_clip_loss, name)()(*student, *teacher, output_dict=True)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


def test_bias_shifts_all_logits_and_keeps_its_place_in_the_graph() -> None:
    data, bias = batch(1), torch.tensor(-10.0, requires_grad=True)
    ours = kdengine.ClipLoss()(data["image"], data["text"], torch.tensor(14.3), bias)
    theirs = open_clip_loss.ClipLoss()(data["image"], data["text"], torch.tensor(14.3), bias)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    assert bias.grad.item() == 0


def test_distillation_value_is_divergence_plus_entropy() -> None:
    data = batch(1)
    student, teacher = (data["image"], data["text"]), (data["dist_image"], data["dist_text"])
    _, distill = kdengine.DistillClipLoss()(*student, 14.3, *teacher, 60.0)
    divergence = kdengine.losses.contrastive_relational(*student, 14.3, *teacher, 60.0)
    logits = 60.0 * teacher[0] @ teacher[1].T
    entropies = [-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)]
    torch.testing.assert_close(distill, divergence + sum(entropies) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_biased_setting_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: local_loss=True needs gather_with_grad=True"):
        getattr(kdengine, name)(local_loss=True, world_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_horovod_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: use_horovod needs to be False"):
        getattr(kdengine, name)(use_horovod=True)


def test_many_ranks_without_a_process_group_are_refused() -> None:
    data = batch(1)
    loss = kdengine.ClipLoss(world_size=2)
    with pytest.raises(RuntimeError, match="world_size=2 needs torch.distributed"):
        loss(data["image"], data["text"], 14.3)


def test_teacher_that_learns_is_refused() -> None:
    data = batch(1)
    data["dist_text"].requires_grad_()
    loss = kdengine.DistillClipLoss()
    with pytest.raises(ValueError, match="teacher_key is a constant"):
        loss(data["image"], data["text"], 14.3, data["dist_image"], data["dist_text"], 60.0)


def test_a_missing_teacher_is_refused() -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    with pytest.raises(TypeError, match="None came; use ClipLoss to train without one"):
        kdengine.DistillClipLoss()(x, x, 10.0, None, None, None)


def test_unpaired_features_are_refused() -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    with pytest.raises(ValueError, match="ClipLoss: .* pairs; 4 and 3 rows came"):
        kdengine.ClipLoss()(x, x[:3], 10.0)
