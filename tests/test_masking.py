# SPDX-License-Identifier: Apache-2.0
"""Masked images: which patches a ViT sees, and who may be masked."""

import pytest
import torch
from torch import Tensor

from kdengine.config import ClipKD as Settings
from kdengine.methods import ClipKD, Distillation
from kdengine.models import TwoTower, build_student
from kdengine.models.masking import TokenMask, install_mask, masked


def vit() -> TwoTower:
    return build_student("ViT-Pico-32", seed=0).tower


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 8), (0.75, 4), (0.3, 11), (0.99, 1), (0.0, 16)])
def test_so_many_patches_are_kept_and_the_class_token(ratio: float, kept: int) -> None:
    tokens = torch.arange(3 * 17.0).reshape(3, 17, 1).expand(-1, -1, 2)
    mask = TokenMask()
    mask.ratio = ratio
    seen = mask(tokens)
    assert seen.shape == (3, 1 + kept, 2)
    assert torch.equal(seen[:, 0], tokens[:, 0])
    for image, all_patches in zip(seen[:, 1:, 0], tokens[:, 1:, 0], strict=True):
        assert len(set(image.tolist())) == kept and set(image.tolist()) <= set(all_patches.tolist())


def test_images_and_calls_are_masked_apart() -> None:
    tokens = torch.arange(101.0)[None, :, None].expand(2, -1, 1)
    mask = TokenMask()
    mask.ratio = 0.5
    first, second = (mask(tokens)[:, 1:, 0].sort(1).values for _ in range(2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    torch.manual_seed(7)
    third = mask(tokens)
    torch.manual_seed(7)
    assert torch.equal(mask(tokens), third)


def test_dropped_patches_have_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = vit()
    install_mask(tower.clip.visual)
    size, patch = tower.clip.visual.image_size[0], tower.clip.visual.patch_size[0]
    grid = size // patch
    # the first half of the patches is kept
    noise = torch.linspace(1, 0, grid * grid)[None]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: noise.expand(shape))
    image = torch.randn(2, 3, size, size)
    other = image.clone()
    other[:, :, size // 2 :] = 0

    def embed(x: Tensor, ratio: float) -> Tensor:
        with torch.no_grad():
            return tower.encode_image(x, ratio)

    assert torch.equal(embed(image, 0.5), embed(other, 0.5))
    assert not torch.allclose(embed(image, 0.0), embed(other, 0.0))
    assert not torch.allclose(embed(image, 0.5), embed(image, 0.0))


def test_the_mask_leaves_with_an_error_and_leaves_no_weights() -> None:
    tower = vit()
    names = set(tower.state_dict())
    install_mask(tower.clip.visual)
    with pytest.raises(KeyError), masked(tower.clip.visual, 0.5):
        raise KeyError
    assert tower.clip.visual.patch_dropout.ratio == 0.0
    assert set(tower.state_dict()) == names


@pytest.mark.parametrize("mask_all", [False, True], ids=["fd alone", "all terms"])
def test_the_root_module_masks_what_it_is_told(mask_all: bool) -> None:
    tower = vit()
    root = Distillation(tower, ClipKD(64, [64], mask_ratio=0.5, mask_all=mask_all))
    ratios: list[float] = []
    mask = tower.clip.visual.patch_dropout
    mask.register_forward_pre_hook(lambda module, _: ratios.append(module.ratio))
    width = tower.clip.text_projection.shape[1]
    root.method = ClipKD(width, [width], mask_ratio=0.5, mask_all=mask_all)
    image = torch.randn(2, 3, *tower.clip.visual.image_size)
    tokens = torch.randint(1, 100, (2, tower.clip.context_length))
    teacher = root.student(image, tokens)
    ratios.clear()
    loss, _ = root(image, tokens, [type(teacher)(*(x.detach() for x in teacher))])
    loss.backward()
    assert ratios == ([0.5] if mask_all else [0.0, 0.5])


def test_only_vision_transformers_are_masked() -> None:
    tower = build_student("RN-Pico-64", seed=0).tower
    with pytest.raises(ValueError, match="mask_ratio: only open_clip's VisionTransformer"):
        Distillation(tower, ClipKD(8, [8], mask_ratio=0.5))


def test_ratio_is_a_share() -> None:
    with pytest.raises(ValueError, match="method.clip_kd.mask_ratio: expected a share"):
        Settings(mask_ratio=1.0)
