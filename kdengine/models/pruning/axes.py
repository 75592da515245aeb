# SPDX-License-Identifier: Apache-2.0
"""What each axis of a tower's tensors counts: residual channels, heads, neurons, ResNet channels.

Axes of one group are cut together, by one choice of units. Names are open_clip's; those of a
``CustomTextCLIP`` lose their ``text.`` first (``canonical``).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Axis(NamedTuple):
    """One axis of a tensor.

    Its size is ``copies * units * width``: query, key and value of a head lie in three copies, a
    head is 64 numbers wide. ``gate`` tells that the tensor's weights along this axis are all that a
    factor on the unit's output would multiply.
    """

    group: str
    width: int = 1
    copies: int = 1
    gate: bool = False


class Layer(NamedTuple):
    """A residual block by the name of its tensors: which stage, which number, what follows."""

    stage: str
    number: int
    rest: str


Axes = tuple[Axis | None, ...]

_BLOCK = re.compile(
    r"^(?P<stage>(?:visual\.)?transformer\.resblocks|visual\.layer[1-4])\.(?P<number>\d+)\.(?P<rest>.+)$"
)


def canonical(name: str) -> str:
    """The name in a native open_clip model: a custom text tower's stand under ``text.``."""
    return name.removeprefix("text.")


def split_layer(name: str) -> Layer | None:
    """The residual block that a canonical name belongs to; None outside of blocks."""
    found = _BLOCK.match(name)
    return None if found is None else Layer(found["stage"], int(found["number"]), found["rest"])


def joined(layer: Layer) -> str:
    """The name that ``split_layer`` took apart."""
    return f"{layer.stage}.{layer.number}.{layer.rest}"


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """The number of blocks of every stack of them, whatever the order of the names."""
    numbers: dict[str, int] = {}
    for layer in map(split_layer, map(canonical, names)):
        if layer is not None:
            numbers[layer.stage] = max(numbers.get(layer.stage, 0), layer.number + 1)
    return numbers


def tower_of(name: str) -> str:
    """``image`` or ``text``, by a canonical name."""
    return "image" if name.startswith("visual.") else "text"


def model_axes(
    shapes: Mapping[str, tuple[int, ...]], head_width: Mapping[str, int]
) -> dict[str, Axes]:
    """The axes of every tensor of a two-tower model, None where an axis is never cut.

    Args:
        shapes: of the tensors, by canonical name.
        head_width: numbers in a head of the ``image`` and of the ``text`` tower.

    Raises:
        ValueError: a tensor that is in none of open_clip's ViT, ModifiedResNet, text transformer.
    """
    resnet = "visual.layer1.0.conv1.weight" in shapes
    found: dict[str, Axes] = {}
    for name, shape in shapes.items():
        width = head_width[tower_of(name)]
        layer = split_layer(name)
        if layer is None:
            axes = _stem(name, resnet)
            axes = _outside(name, width) if axes is None else axes
        elif "resblocks" in layer.stage:
            axes = _transformer(layer, width)
        else:
            axes = _resnet_block(layer)
        if axes is None:
            raise ValueError(
                f"cut: the tensor {name} is in no ViT, ModifiedResNet or text transformer of "
                "open_clip, the towers that can be cut; take a teacher and a student of these"
            )
        found[name] = (*axes, *[None] * (len(shape) - len(axes)))
    return found


def _transformer(layer: Layer, head_width: int) -> Axes | None:
    """One block of a transformer; the residual stream is one group for the whole tower."""
    tower = "image" if layer.stage.startswith("visual.") else "text"
    residual, writes = Axis(f"{tower}.channels"), Axis(f"{tower}.channels", gate=True)
    heads, neurons = f"{tower}.{layer.number}.heads", f"{tower}.{layer.number}.neurons"
    stacked = Axis(heads, head_width, 3)
    table: dict[str, Axes] = {
        "attn.in_proj_weight": (stacked, residual),
        "attn.in_proj_bias": (stacked,),
        "attn.out_proj.weight": (writes, Axis(heads, head_width, gate=True)),
        "attn.out_proj.bias": (writes,),
        "mlp.c_fc.weight": (Axis(neurons), residual),
        "mlp.c_fc.bias": (Axis(neurons),),
        "mlp.c_proj.weight": (writes, Axis(neurons, gate=True)),
        "mlp.c_proj.bias": (writes,),
    }
    if re.fullmatch(r"ln_[12]\.(weight|bias)|ls_[12]\.gamma", layer.rest):
        return (residual,)
    return table.get(layer.rest)


def _resnet_block(layer: Layer) -> Axes | None:
    """One bottleneck of a ModifiedResNet; the blocks of a stage share their output channels."""
    stage = int(layer.stage[-1])
    block = f"image.{stage}.{layer.number}"
    out = Axis(f"image.{stage}.channels")
    before = out if layer.number else Axis(f"image.{stage - 1}.channels")
    first, second = Axis(f"{block}.first"), Axis(f"{block}.second")
    table: dict[str, Axes] = {
        "conv1.weight": (first, before),
        "conv2.weight": (second, first),
        "conv3.weight": (out, second),
        "downsample.0.weight": (out, before),
    }
    norms = {"bn1": first, "bn2": second, "bn3": out, "downsample.1": out}
    norm, _, kind = layer.rest.rpartition(".")
    if norm in norms:
        return _batch_norm(norms[norm], kind)
    return table.get(layer.rest)


def _batch_norm(axis: Axis, kind: str) -> Axes | None:
    if kind == "num_batches_tracked":
        return ()
    return (axis._replace(gate=kind in ("weight", "bias")),)


def _stem(name: str, resnet: bool) -> Axes | None:
    """The first convolutions of the image tower, which share a name."""
    if name == "visual.conv1.weight" and not resnet:
        return (Axis("image.channels", gate=True),)
    first, second, out = (Axis(f"image.{x}") for x in ("stem.first", "stem.second", "0.channels"))
    if found := re.fullmatch(r"visual\.bn([123])\.(\w+)", name):
        return _batch_norm((first, second, out)[int(found[1]) - 1], found[2])
    table = {"conv1": (first,), "conv2": (second, first), "conv3": (out, second)}
    return table.get(name.removeprefix("visual.").removesuffix(".weight"))


def _outside(name: str, head_width: int) -> Axes | None:
    """Embeddings, last norms, projections, scales."""
    image, text = Axis("image.channels"), Axis("text.channels")
    heads, last = Axis("image.pool.heads", head_width), Axis("image.4.channels")
    table: dict[str, Axes] = {
        "logit_scale": (),
        "logit_bias": (),
        "visual.class_embedding": (image._replace(gate=True),),
        "visual.positional_embedding": (None, image._replace(gate=True)),
        "visual.proj": (image,),
        "token_embedding.weight": (None, text._replace(gate=True)),
        "positional_embedding": (None, text._replace(gate=True)),
        "text_projection": (text,),
        "visual.attnpool.positional_embedding": (None, last),
        "visual.attnpool.c_proj.weight": (None, heads._replace(gate=True)),
        "visual.attnpool.c_proj.bias": (),
    }
    if re.fullmatch(r"visual\.ln_(pre|post)\.(weight|bias)", name):
        return (image,)
    if re.fullmatch(r"ln_final\.(weight|bias)", name):
        return (text,)
    if found := re.fullmatch(r"visual\.attnpool\.[qkv]_proj\.(weight|bias)", name):
        return (heads, last) if found[1] == "weight" else (heads,)
    return table.get(name)
