# SPDX-License-Identifier: Apache-2.0
"""Transformer towers whose layers differ: other numbers of heads and neurons in each, any width.

Structured pruning leaves such towers, and open_clip's blocks cannot hold them: there, heads times
their width is the width of the tower. The blocks here keep the names of open_clip's tensors, run on
``scaled_dot_product_attention``, and can be gated, which is how a tower is pruned in the first
place (``masks``). A layer without heads or without neurons keeps the bias that its
sublayer adds, and nothing else of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

Tower = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class RaggedShape:
    """The sizes of a transformer tower.

    Attributes:
        width: channels of the residual stream.
        head_width: numbers in a head.
        heads: of each layer, 0 for a layer without attention.
        neurons: of each layer, 0 for a layer without a feed-forward network.
    """

    width: int
    head_width: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = [self.width, self.head_width]
        if len(self.heads) != len(self.neurons) or min(sizes) < 1 or min(self.all_units()) < 0:
            raise ValueError(
                "RaggedShape: expected a width and head_width of at least 1 and one number of "
                f"heads and of neurons for each layer, 0 or more; {self} came"
            )

    def all_units(self) -> tuple[int, ...]:
        """Heads and neurons of all layers."""
        return self.heads + self.neurons

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RaggedShape":
        """What ``to_dict`` wrote."""
        return cls(
            width=values["width"],
            head_width=values["head_width"],
            heads=tuple(values["heads"]),
            neurons=tuple(values["neurons"]),
        )


class Gates:
    """Factors on the units of a tower, shared by its modules; None: all are 1.

    Attributes:
        channels: [width].
        heads: [heads] for each layer.
        neurons: [neurons] for each layer.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No factors."""
        self.channels: Tensor | None = None
        self.heads: Sequence[Tensor] = ()
        self.neurons: Sequence[Tensor] = ()

    def write(self, x: Tensor) -> Tensor:
        """What reaches the residual stream of something written to it."""
        return x if self.channels is None else x * self.channels.to(x.dtype)


class GatedNorm(nn.LayerNorm):
    """LayerNorm over the channels whose gate is not 0; the others come out as 0.

    That is the norm of the tower that lacks them. Its shapes do not depend on the gates, and no
    gradient reaches these from here.
    """

    def __init__(self, width: int, eps: float, gates: Gates, *, writes: bool = False) -> None:
        super().__init__(width, eps=eps)
        self.gates, self.writes = gates, writes

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., width]; with ``writes`` what comes in is written to the stream first."""
        channels = self.gates.channels
        if channels is None:
            return super().forward(x).to(x.dtype)
        if self.writes:
            x = self.gates.write(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        alive = (channels != 0).to(values.dtype)
        count = alive.sum()
        # a norm over all channels does it, if the others are at the mean and these are spread so
        # that the variance over all is that of these alone
        spread = (channels.numel() / count).sqrt()
        values = values * (spread * alive)
        values = torch.addcmul(values, values.sum(-1, keepdim=True) / count, 1 - alive)
        weight, bias = self.weight * (alive / spread), self.bias * alive
        return F.layer_norm(values, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GatedLinear(nn.Linear):
    """A linear layer with factors on its inputs and outputs.

    The weights take them: a pass over the weights costs less than one over a batch.
    """

    def forward(
        self, x: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None
    ) -> Tensor:
        """Shapes: x [..., I], inputs [I], outputs [O] -> [..., O]."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if inputs is not None:
            weight = weight * inputs.to(weight.dtype)
        if outputs is not None:
            outputs = outputs.to(weight.dtype)
            weight, bias = weight * outputs[:, None], bias * outputs
        return F.linear(x, weight, bias)


class Attention(nn.Module):
    """Self-attention with any number of heads, under the names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * heads * head_width))
        self.out_proj = GatedLinear(heads * head_width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, heads: Tensor | None, channels: Tensor | None
    ) -> Tensor:
        """Shapes: x [b, n, width], mask [n, n], heads [h], channels [width] -> [b, n, width]."""
        stacked = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = stacked.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        # under autocast the products are rounded, the stream is not
        mask = None if mask is None else mask.to(query.dtype)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        inputs = None if heads is None else heads.repeat_interleave(self.head_width)
        return self.out_proj(seen.transpose(1, 2).flatten(2), inputs, channels)


class BiasOnly(nn.Module):
    """What is left of a linear layer without inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self) -> Tensor:
        """The bias [width], a copy: ZeRO-3 frees the parameter afterwards."""
        return self.bias.clone()


class RaggedBlock(nn.Module):
    """A residual block, called as open_clip's is."""

    def __init__(
        self, shape: RaggedShape, number: int, activation: nn.Module, eps: float, gates: Gates
    ) -> None:
        super().__init__()
        self.number, self.gates = number, gates
        self.heads, self.neurons = shape.heads[number], shape.neurons[number]
        self.attn: Any = nn.Module()
        self.mlp: Any = nn.Module()
        if self.heads:
            self.ln_1 = GatedNorm(shape.width, eps, gates)
            self.attn = Attention(shape.width, self.heads, shape.head_width)
        else:
            self.attn.out_proj = BiasOnly(shape.width)
        if self.neurons:
            self.ln_2 = GatedNorm(shape.width, eps, gates)
            self.mlp.c_fc = nn.Linear(shape.width, self.neurons)
            self.mlp.gelu = activation
            self.mlp.c_proj = GatedLinear(self.neurons, shape.width)
        else:
            self.mlp.c_proj = BiasOnly(shape.width)

    def get_weight_dtype(self) -> torch.dtype:
        """What open_clip casts the stream to."""
        return next(self.parameters()).dtype

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Shapes: [b, n, width] -> [b, n, width]; self-attention, so k_x and v_x stay None."""
        x, gates = q_x, self.gates
        if self.heads:
            heads = gates.heads[self.number] if gates.heads else None
            x = x + self.attn(self.ln_1(x), attn_mask, heads, gates.channels)
        else:
            x = x + gates.write(self.attn.out_proj())
        if not self.neurons:
            return x + gates.write(self.mlp.c_proj())
        hidden = self.mlp.gelu(self.mlp.c_fc(self.ln_2(x)))
        neurons = gates.neurons[self.number] if gates.neurons else None
        return x + self.mlp.c_proj(hidden, neurons, gates.channels)


def tower_shape(clip: nn.Module, tower: Tower) -> RaggedShape:
    """The sizes of a tower of open_clip's blocks, or of ragged ones.

    Raises:
        ValueError: it is no transformer of open_clip's.
    """
    blocks: Any = _home(clip, tower).transformer.resblocks
    if isinstance(blocks[0], RaggedBlock):
        heads = tuple(block.heads for block in blocks)
        head_width = next((b.attn.head_width for b in blocks if b.heads), 1)
        neurons = tuple(block.neurons for block in blocks)
        width = blocks[0].mlp.c_proj.bias.numel()
    else:
        heads = tuple(block.attn.num_heads for block in blocks)
        head_width, width = blocks[0].attn.head_dim, blocks[0].attn.embed_dim
        neurons = tuple(block.mlp.c_fc.out_features for block in blocks)
    return RaggedShape(width=width, head_width=head_width, heads=heads, neurons=neurons)


def install_ragged(clip: nn.Module, tower: Tower, shape: RaggedShape) -> Gates:
    """Replace a tower's modules, in place, by ragged ones; their weights are yet to be loaded.

    Returns:
        The gates of the tower.

    Raises:
        ValueError: it is no transformer of open_clip's with the usual parts.
    """
    home, gates = _home(clip, tower), Gates()
    blocks: Any = home.transformer.resblocks
    activations = [b.mlp.gelu for b in blocks if hasattr(b.mlp, "gelu")]
    if not activations:
        raise ValueError(f"ragged: no layer of the {tower} tower has neurons left")
    last = "ln_post" if tower == "image" else "ln_final"
    eps = getattr(home, last).eps
    home.transformer.resblocks = nn.ModuleList(
        RaggedBlock(shape, number, activations[0], eps, gates) for number in range(len(shape.heads))
    )
    home.transformer.width, home.transformer.layers = shape.width, len(shape.heads)
    setattr(home, last, GatedNorm(shape.width, eps, gates))
    home.positional_embedding = _resized(home.positional_embedding, -1, shape.width)
    if tower == "image":
        conv = home.conv1
        home.conv1 = nn.Conv2d(3, shape.width, conv.kernel_size, conv.stride, bias=False)
        home.class_embedding = _resized(home.class_embedding, 0, shape.width)
        home.ln_pre = GatedNorm(shape.width, eps, gates, writes=True)
        home.proj = _resized(home.proj, 0, shape.width)
    else:
        home.token_embedding = nn.Embedding(home.token_embedding.num_embeddings, shape.width)
        home.text_projection = _resized(home.text_projection, 0, shape.width)
        home.transformer.register_forward_pre_hook(
            lambda _, given: (gates.write(given[0]), *given[1:])
        )
    return gates


def _resized(old: Tensor, dim: int, size: int) -> nn.Parameter:
    shape = list(old.shape)
    shape[dim] = size
    return nn.Parameter(torch.empty(shape, dtype=old.dtype))


def _home(clip: nn.Module, tower: Tower) -> Any:
    """The module that holds the tower's transformer, checked."""
    home: Any = clip.visual if tower == "image" else getattr(clip, "text", clip)
    blocks = getattr(getattr(home, "transformer", None), "resblocks", None)
    parts = ("ln_1", "attn", "ln_2", "mlp")
    usual = blocks is not None and all(
        isinstance(block, RaggedBlock)
        or (
            all(hasattr(block, part) for part in parts)
            and isinstance(block.attn, nn.MultiheadAttention)
            and isinstance(block.ls_1, nn.Identity)
        )
        for block in blocks
    )
    if tower == "image":
        usual = usual and isinstance(home, VisionTransformer) and home.attn_pool is None
        usual = usual and not isinstance(home.ln_pre, nn.Identity)
    else:
        usual = usual and isinstance(home.text_projection, nn.Parameter)
        usual = usual and getattr(home, "cls_emb", None) is None
        usual = usual and not getattr(home, "use_pad_mask", False)
    if not usual:
        raise ValueError(
            f"ragged: the {tower} tower is no transformer of open_clip with the usual parts (one "
            "attention and one feed-forward network a block, norms before them, a projection); "
            "only such towers are pruned"
        )
    return home
