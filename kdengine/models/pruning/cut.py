# SPDX-License-Identifier: Apache-2.0
"""Cut a gated tower into one without gates that computes the same (TinyCLIP, section 3.2).

A unit with a factor of 0 is left out; the factor of any other is multiplied into the weights that
write what it gates. Nothing else changes, the projection neither: the released code multiplies that
by the channels' factors too, which its gated forward does not do. A layer that loses all heads
keeps the bias of its output projection.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from kdengine.models.pruning.axes import canonical, model_axes
from kdengine.models.pruning.ragged import RaggedShape

Factors = Mapping[str, Tensor]


class Dense(NamedTuple):
    """The tensors of a cut model by their names, and the shapes of its towers."""

    tensors: dict[str, Tensor]
    shapes: dict[str, RaggedShape]


def cut(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, RaggedShape], factors: Factors
) -> Dense:
    """Apply the factors of the units to the weights of a model, and leave out those that are 0.

    Args:
        tensors: the state dict of an open_clip model, ragged or not.
        shapes: of its towers, by ``image`` and ``text``.
        factors: by the groups of ``axes``: ``image.channels`` [width], ``text.3.heads``
            [heads], ...; a group without an entry stays whole.

    Returns:
        New tensors, and shapes.

    Raises:
        ValueError: a tower that would have no channel left, or factors of the wrong length.
    """
    names = {canonical(name): name for name in tensors}
    head_width = {tower: shape.head_width for tower, shape in shapes.items()}
    # a tower that is not transformer has no heads that are cut
    head_width = {"image": 64, "text": 64} | head_width
    axes = model_axes({name: tuple(tensors[own].shape) for name, own in names.items()}, head_width)
    kept = {group: factor.nonzero().flatten() for group, factor in factors.items()}
    for tower in shapes:
        if not len(kept.get(f"{tower}.channels", [0])):
            raise ValueError(f"cut: the {tower} tower would have no channel left; prune less")
    found = {}
    for name, own in names.items():
        value = tensors[own].detach()
        for dim, axis in enumerate(axes[name]):
            if axis is None or axis.group not in factors:
                continue
            units = value.unflatten(dim, (axis.copies, -1, axis.width))
            if units.shape[dim + 1] != len(factors[axis.group]):
                raise ValueError(
                    f"cut: {axis.group} has {units.shape[dim + 1]} units; "
                    f"{len(factors[axis.group])} factors came"
                )
            units = units.index_select(dim + 1, kept[axis.group])
            if axis.gate:
                factor = factors[axis.group][kept[axis.group]].to(value.dtype)
                units = units * factor.reshape(-1, *[1] * (units.dim() - dim - 2))
            value = units.flatten(dim, dim + 2)
        found[own] = value.clone()
    cut_shapes = {tower: _cut_shape(tower, shape, kept) for tower, shape in shapes.items()}
    return Dense(_without_empty(found, cut_shapes), cut_shapes)


def _cut_shape(tower: str, shape: RaggedShape, kept: Mapping[str, Tensor]) -> RaggedShape:
    def count(group: str, whole: int) -> int:
        return len(kept[group]) if group in kept else whole

    def of_layers(kind: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(count(f"{tower}.{n}.{kind}", size) for n, size in enumerate(sizes))

    return RaggedShape(
        width=count(f"{tower}.channels", shape.width),
        head_width=shape.head_width,
        heads=of_layers("heads", shape.heads),
        neurons=of_layers("neurons", shape.neurons),
    )


def _without_empty(
    tensors: dict[str, Tensor], shapes: Mapping[str, RaggedShape]
) -> dict[str, Tensor]:
    """What is left of sublayers without units is their last bias."""
    gone = set()
    for tower, shape in shapes.items():
        prefix = r"visual\.transformer" if tower == "image" else r"transformer"
        for number, (heads, neurons) in enumerate(zip(shape.heads, shape.neurons, strict=True)):
            block = rf"{prefix}\.resblocks\.{number}\."
            if not heads:
                gone.add(block + r"(ln_1\..*|attn\.(in_proj.*|out_proj\.weight))")
            if not neurons:
                gone.add(block + r"(ln_2\..*|mlp\.(c_fc\..*|c_proj\.weight))")
    return {
        name: value
        for name, value in tensors.items()
        if not any(re.fullmatch(pattern, canonical(name)) for pattern in gone)
    }
