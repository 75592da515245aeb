# SPDX-License-Identifier: Apache-2.0
"""Prompts in a frozen CLIP: learnable tokens in the first layers of its transformers.

    image tower    ``tokens`` more tokens behind the patches, before the first norm; those of each
                   further layer of ``depth`` take the place of what became of them (deep visual
                   prompts)
    text tower     the places 1 to ``tokens``, behind the start token, hold prompts in place of the
                   words there ("a photo of a"), anew in each of the first ``depth`` layers

Every tensor of open_clip keeps its name; the prompts are ``visual.transformer.prompts`` and
``transformer.prompts``, [depth, tokens, width].

The form is that of PromptSRC and PromptKD, which ComKD-CLIP builds on; how many prompts and layers
ComKD-CLIP itself takes is not known. One thing differs: the first prompts of the text tower stand
behind the positional embeddings, which they take over when they start from words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from open_clip.transformer import Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdengine.models.bridge import Bridge
from kdengine.models.pruning.ragged import Tower

# the deviation of prompts that start from no words
PROMPT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """How many prompts a layer has, and how many layers have some."""

    tokens: int
    depth: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.depth) < 1:
            raise ValueError(
                f"PromptShape: expected at least one token in at least one layer, got {self}; a "
                "tower without prompts has no shape at all"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class PromptedTransformer(Transformer):
    """open_clip's transformer, with prompts in its first layers.

    Attributes:
        prompts: [depth, tokens, width].
        in_front: the prompts stand at places 1 to ``tokens``; else at the end, and those of the
            first layer are there when the tokens come in.
    """

    prompts: nn.Parameter
    in_front: bool

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Shapes: [b, n, width] -> [b, n, width]."""
        for number, block in enumerate(self.resblocks):
            if number < len(self.prompts):
                x = self._placed(x, number)
            if self.grad_checkpointing:
                x = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x

    def _placed(self, x: Tensor, number: int) -> Tensor:
        prompts = self.prompts[number].to(x.dtype).expand(len(x), -1, -1)
        size = prompts.shape[1]
        if self.in_front:
            return torch.cat([x[:, :1], prompts, x[:, 1 + size :]], 1)
        return torch.cat([x[:, :-size], prompts], 1) if number else x


class PromptedVision(VisionTransformer):
    """open_clip's ViT, with prompts behind its patches and a bridge behind its projection.

    Attributes:
        bridge: what brings embeddings into the space of a teacher; None where there is none.
    """

    bridge: Bridge | None
    transformer: PromptedTransformer

    def forward(self, x: Tensor) -> Tensor:
        """Raw embeddings [b, D] of images [b, 3, S, S]."""
        features = super().forward(x)
        return features if self.bridge is None else self.bridge(features)

    def bridged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [b, E] before the attention of the bridge, and what comes out behind."""
        assert self.bridge is not None
        unit = self.bridge.unit(super().forward(x))
        return unit, self.bridge.attend(unit)

    def _embeds(self, x: Tensor) -> Tensor:
        tokens = super()._embeds(x)
        first = self.ln_pre(self.transformer.prompts[0].to(tokens.dtype))
        return torch.cat([tokens, first.to(tokens.dtype).expand(len(tokens), -1, -1)], 1)


def install_prompts(clip: nn.Module, tower: Tower, shape: PromptShape) -> PromptedTransformer:
    """Give a tower of an open_clip model random prompts, in place; no other tensor is touched.

    Returns:
        The transformer that holds them.

    Raises:
        ValueError: the tower is no transformer of open_clip that prompts fit into.
    """
    transformer = _transformer(clip, tower)
    if not isinstance(transformer, PromptedTransformer):
        transformer.__class__ = PromptedTransformer
    if shape.depth > len(transformer.resblocks):
        raise ValueError(
            f"prompts: the {tower} tower has {len(transformer.resblocks)} layers, fewer than the "
            f"{shape.depth} that are to have prompts (--prompt.depth)"
        )
    width = transformer.resblocks[0].ln_1.weight
    values = PROMPT_STD * torch.randn(shape.depth, shape.tokens, len(width))
    transformer.prompts = nn.Parameter(values.to(width))
    transformer.in_front = tower == "text"
    if tower == "image":
        clip.visual.__class__ = PromptedVision
        clip.visual.bridge = None  # type: ignore[union-attr]
    return transformer


@torch.no_grad()
def start_from_words(clip: nn.Module, words: Tensor) -> None:
    """Let the first layer's text prompts start from the token ids that they take the place of.

    Shapes: words [tokens], the ids behind the start token.
    """
    home: Any = getattr(clip, "text", clip)
    prompts = home.transformer.prompts
    if len(words) != prompts.shape[1]:
        raise ValueError(
            f"prompts: {prompts.shape[1]} text prompts start from as many words; {len(words)} came"
        )
    positions = home.positional_embedding[1 : 1 + len(words)]
    prompts[0] = home.token_embedding(words) + positions


def install_all(clip: nn.Module, prompts: Mapping[str, Mapping[str, int]]) -> None:
    """Install the prompts that a model configuration lists under ``prompts``, by tower."""
    for tower, sizes in prompts.items():
        install_prompts(clip, tower, PromptShape(**sizes))  # type: ignore[arg-type]


def train_only(clip: nn.Module, towers: Sequence[Tower]) -> list[str]:
    """Freeze an open_clip model but for the prompts of these towers, and a bridge.

    Returns:
        The names of what is left to train.
    """
    clip.requires_grad_(False)
    for tower in towers:
        _transformer(clip, tower).prompts.requires_grad_()  # type: ignore[union-attr]
    if getattr(clip.visual, "bridge", None) is not None:
        clip.visual.bridge.requires_grad_()  # type: ignore[union-attr]
    return [name for name, value in clip.named_parameters() if value.requires_grad]


def _transformer(clip: nn.Module, tower: Tower) -> Any:
    """The transformer of a tower, checked."""
    home: Any = clip.visual if tower == "image" else getattr(clip, "text", clip)
    found: Any = getattr(home, "transformer", None)
    usual = type(found) in (Transformer, PromptedTransformer) and found.batch_first
    usual = usual and all(hasattr(block, "ln_1") for block in found.resblocks)
    if tower == "image":
        usual = usual and type(home) in (VisionTransformer, PromptedVision)
        # pools over all tokens would take the prompts in
        usual = usual and home.attn_pool is None and home.pool_type == "tok"
    if not usual:
        kind = type(home).__name__
        raise ValueError(
            f"prompts: the {tower} tower ({kind}) is no transformer of open_clip that prompts fit "
            "into; take a ViT that pools by its class token, with a text transformer of open_clip"
        )
    return found
