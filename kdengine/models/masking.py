# SPDX-License-Identifier: Apache-2.0
"""Masked images: a ViT that sees a random part of its patches, as MAE and FLIP do."""

import contextlib
from collections.abc import Iterator

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn


class TokenMask(nn.Module):
    """Keeps ``int(n (1 - ratio))`` random patches of each image, at least one, and the class token.

    Stands where open_clip drops patches: after the positional embeddings, before the transformer.
    Drawn on the device, with torch's generator, anew for each image and call.

    Attributes:
        ratio: share of the patches that is dropped; 0 passes everything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ratio = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: [b, 1 + n, width] -> [b, 1 + kept, width]."""
        if not self.ratio:
            return tokens
        batch, num_patches = tokens.shape[0], tokens.shape[1] - 1
        kept = max(1, int(num_patches * (1 - self.ratio)))
        noise = torch.rand(batch, num_patches, device=tokens.device)
        places = 1 + noise.topk(kept, dim=1).indices
        patches = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], patches], 1)


def install_mask(visual: nn.Module) -> None:
    """Prepare an image tower for ``masked``; its weights and their names stay as they are.

    Raises:
        ValueError: the tower is not open_clip's ViT, or drops patches already.
    """
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"mask_ratio: only open_clip's VisionTransformer drops patches, and the student has a "
            f"{type(visual).__name__}; take a ViT, or set the ratio to 0"
        )
    if isinstance(visual.patch_dropout, PatchDropout):
        raise ValueError(
            f"mask_ratio: the student drops {visual.patch_dropout.prob:.0%} of its patches already "
            "(patch_dropout of its configuration); set one of them to 0"
        )
    visual.patch_dropout = TokenMask()


@contextlib.contextmanager
def masked(visual: nn.Module, ratio: float) -> Iterator[None]:
    """While this lasts, the tower sees ``1 - ratio`` of each image's patches."""
    if not ratio:
        yield
        return
    mask = visual.patch_dropout
    assert isinstance(mask, TokenMask)
    mask.ratio = ratio
    try:
        yield
    finally:
        mask.ratio = 0.0
