# SPDX-License-Identifier: Apache-2.0
"""The two-tower wrapper over open_clip: images and tokens in, un-normalised embeddings out."""

import math
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from kdengine.models.masking import masked
from kdengine.models.spec import TowerSpec

LOG_SCALE_MAX = math.log(100)


class Features(NamedTuple):
    """Embeddings of a batch of pairs.

    ``image`` and ``text`` are raw, not normalised, [b, D] in the dtype of the model; ``scale`` is
    the multiplier of the cosines (already exponentiated, fp32), shape [1] or 0-D.
    """

    image: Tensor
    text: Tensor
    scale: Tensor


class _RawForward:
    """Gives an open_clip model a forward that returns raw embeddings and the clamped scale.

    It has to be the forward of the open_clip module itself: the positional embedding and the text
    projection are parameters of that module, and ZeRO-3 fetches a module's own parameters only
    around that module's forward.
    """

    # the largest log scale that counts; None leaves a teacher's scale as it was trained
    log_scale_max: float | None = LOG_SCALE_MAX

    def forward(
        self: Any, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        image_features = None if image is None else self.encode_image(image, normalize=False)
        text_features = None if text is None else self.encode_text(text, normalize=False)
        log_scale = self.logit_scale.float()
        if self.log_scale_max is not None:
            # here, not in place: ZeRO rewrites the parameter from its fp32 master every step
            log_scale = log_scale.clamp(0, self.log_scale_max)
        return image_features, text_features, log_scale.exp()


class _RawCLIP(_RawForward, open_clip.CLIP):
    pass


class _RawCustomTextCLIP(_RawForward, open_clip.CustomTextCLIP):
    pass


class _RawCoCa(_RawForward, open_clip.CoCa):
    pass


_RAW: dict[type, type] = {
    open_clip.CLIP: _RawCLIP,
    open_clip.CustomTextCLIP: _RawCustomTextCLIP,
    open_clip.CoCa: _RawCoCa,
}


class TwoTower(nn.Module):
    """An open_clip model that returns raw embeddings.

    Args:
        clip: the open_clip model, changed in place: its own forward returns raw embeddings too.
        clamp_scale: keep the log scale within [0, ln 100] in the forward pass. The gradient of the
            log scale is zero outside; clamp the optimiser's master copy as well.

    Attributes:
        clip: the open_clip model; its state dict is what open_clip loads.
    """

    def __init__(self, clip: nn.Module, *, clamp_scale: bool = True) -> None:
        super().__init__()
        if type(clip) not in _RAW:
            raise TypeError(
                f"TwoTower: expected one of {[c.__name__ for c in _RAW]}, got "
                f"{type(clip).__name__}; build the model with open_clip.create_model"
            )
        clip.__class__ = _RAW[type(clip)]
        clip.log_scale_max = LOG_SCALE_MAX if clamp_scale else None  # type: ignore[assignment]
        self.clip = clip

    @property
    def log_scale(self) -> nn.Parameter:
        """The logarithm of the scale: the parameter, shape [1] for students."""
        return self.clip.logit_scale  # type: ignore[return-value]

    def pin_scale(self, scale: float) -> None:
        """Make the scale a constant, which no optimiser sees."""
        self.log_scale.requires_grad_(False).fill_(math.log(scale))

    def forward(self, image: Tensor, tokens: Tensor, mask_ratio: float = 0.0) -> Features:
        """Embed a batch of pairs.

        Shapes: image [b, 3, S, S], tokens [b, context] integers. With ``mask_ratio`` the image
        tower, once prepared by ``install_mask``, sees the rest of each image's patches only.

        Returns:
            Raw embeddings [b, D] in the dtype of the weights, and ``exp(log_scale)`` in fp32.

        Gradients: to all weights and the log scale.
        """
        with masked(self.clip.visual, mask_ratio):  # type: ignore[arg-type]
            return Features(*self.clip(self._cast(image), tokens))

    def encode_image(self, image: Tensor, mask_ratio: float = 0.0) -> Tensor:
        """Raw embeddings [b, D] of images [b, 3, S, S]."""
        with masked(self.clip.visual, mask_ratio):  # type: ignore[arg-type]
            return self.clip(self._cast(image), None)[0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raw embeddings [b, D] of tokens [b, context]."""
        return self.clip(None, tokens)[1]

    def bridged_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, 3, S, S] before and behind EduAttention, [b, E]; see ``models.bridge``."""
        return self.clip.visual.bridged(self._cast(image))  # type: ignore[union-attr,operator]

    def gate(self) -> nn.Parameter | None:
        """The gate of EduAttention, where there is one."""
        bridge: Any = getattr(self.clip.visual, "bridge", None)
        return None if bridge is None or bridge.attention is None else bridge.attention.gate

    def scale(self) -> Tensor:
        """The multiplier of cosines, already exponentiated, fp32."""
        return self.clip(None, None)[2]

    def _cast(self, image: Tensor) -> Tensor:
        """Give images the dtype of the weights: an engine may have cast those to bf16."""
        weights = self.clip.visual.parameters()  # type: ignore[union-attr,operator]
        return image.to(next(p.dtype for p in weights if p.is_floating_point()))


class Student(NamedTuple):
    """A model to train, and what it is."""

    tower: TwoTower
    spec: TowerSpec


class Teacher:
    """A frozen model: evaluation mode, no gradients, its own dtype.

    Not an ``nn.Module``, so that no training engine can adopt its weights by accident.

    A sigmoid model (SigLIP) serves as it is: its bias adds the same constant to every logit, which
    drops out of each softmax over a row or a column, so the losses need not know it.
    """

    def __init__(self, tower: TwoTower, spec: TowerSpec, dtype: torch.dtype = torch.float32):
        self.tower = tower.eval().requires_grad_(False)
        self.spec = spec
        self.dtype = dtype
        _round(self.tower, dtype)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the weights; returns itself."""
        self.tower.to(device)
        return self

    def scale(self) -> float:
        """Its multiplier of cosines, already exponentiated."""
        return float(self.tower.log_scale.float().exp())

    @torch.inference_mode()
    def encode_image(self, image: Tensor) -> Tensor:
        """Raw embeddings [b, E] of images [b, 3, S, S]; an inference tensor."""
        return self.tower.encode_image(image)

    @torch.inference_mode()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raw embeddings [b, E] of tokens [b, context]; an inference tensor."""
        return self.tower.encode_text(tokens)

    def __call__(self, image: Tensor, tokens: Tensor) -> Features:
        """Embed a batch of pairs without graph.

        Shapes: image [b, 3, S, S], tokens [b, context]; S and the context are the teacher's own.

        Returns:
            Raw embeddings [b, E] in the teacher's dtype and its scale in fp32: constants that may
            be saved for a backward pass.
        """
        with torch.inference_mode():
            found = self.tower(image, tokens)
        # autograd refuses to save inference tensors; clones made out here are ordinary ones
        return Features(*(x.clone() for x in found))


def _round(tower: TwoTower, dtype: torch.dtype) -> None:
    """Cast weights and buffers, but not batch norms and the scale: bf16 keeps 3 digits of them."""
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own:
            if tensor.is_floating_point() and tensor is not tower.log_scale:
                tensor.data = tensor.data.to(dtype)
