# SPDX-License-Identifier: Apache-2.0
"""A smaller student cut out of its teacher's weights (TinyCLIP, Wu et al. 2023, section 3.2).

Decisions, where the paper or its released code leaves a choice:

* Depth ``front`` is the released rule, student layer i from teacher layer ``i * floor(n / k)``:
  12 to 9 takes the first nine. ``even`` spreads the k layers over all n, first and last included.
* Width ``front`` keeps the first heads, channels and neurons, as released. With scores, the units
  with the largest are kept, in their order: a score a unit, see ``axes`` for what a unit is.
* Indices are read from the names of the tensors, never from their order in a file.
* The logit scale is inherited too. The activation belongs to the weights: where teacher and student
  differ in ``quick_gelu``, ``student_spec`` takes the teacher's.
* What is never cut must be equal: embedding width, vocabulary, context length, patch grid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdengine.models.pruning.axes import (
    Axes,
    Axis,
    canonical,
    joined,
    layer_counts,
    model_axes,
    split_layer,
)
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import Student

Depth = Literal["front", "even"]
Fated = Literal["kept", "sliced", "left"]
Scores = Mapping[str, Tensor]


class Fate(NamedTuple):
    """What became of one tensor: ``kept`` whole, ``sliced``, or ``left`` with the teacher."""

    name: str
    source: str
    fate: Fated
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]


class Inheritance(NamedTuple):
    """A cut.

    Attributes:
        tensors: the student's, by its own names.
        fates: what became of every tensor of both.
        layers: of each stack of blocks the teacher's layer of each of the student's.
        units: of each group the units that were kept, ascending.
        available: of each group how many the teacher has.
    """

    tensors: dict[str, Tensor]
    fates: list[Fate]
    layers: dict[str, list[int]]
    units: dict[str, Tensor]
    available: dict[str, int]


def layer_map(teacher: int, student: int, depth: Depth) -> list[int]:
    """The teacher's layer of each of the student's.

    ``front``: ``i * floor(n / k)``. ``even``: ``i (n - 1) / (k - 1)``, rounded; a single layer is
    the first.

    Raises:
        ValueError: the student is deeper.
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"expected 1 to {teacher} layers, the teacher's; {student} came")
    if depth == "front":
        return [i * (teacher // student) for i in range(student)]
    # halves up, in integers
    return [
        (2 * i * (teacher - 1) + student - 1) // max(2 * (student - 1), 1) for i in range(student)
    ]


def student_spec(spec: TowerSpec, teacher: TowerSpec) -> TowerSpec:
    """The student's spec with what belongs to the weights: activation, mean and std."""
    quick = bool(teacher.model_cfg.get("quick_gelu", False))
    seen = dataclasses.replace(
        spec.preprocess, mean=teacher.preprocess.mean, std=teacher.preprocess.std
    )
    return dataclasses.replace(
        spec, model_cfg={**spec.model_cfg, "quick_gelu": quick}, preprocess=seen
    )


def head_widths(spec: TowerSpec) -> dict[str, int]:
    """Numbers in a head of the image and of the text tower, as open_clip builds them."""
    vision, text = spec.model_cfg["vision_cfg"], spec.model_cfg["text_cfg"]
    return {
        "image": int(vision.get("head_width", 64)),
        "text": int(text.get("width", 512)) // int(text.get("heads", 8)),
    }


def inherit(
    teacher: Student, student: Student, *, depth: Depth = "front", scores: Scores | None = None
) -> Inheritance:
    """Fill every tensor of a student from its teacher.

    Args:
        teacher: the larger model, whole.
        student: gives names and shapes; it is not changed.
        depth: see ``layer_map``.
        scores: of the teacher's units, by group; None keeps the first ones.

    Returns:
        The tensors of ``student.tower.clip``, copies, and what became of each.

    Raises:
        ValueError: a tower that cannot be cut, other head widths, a student that is larger
            somewhere or differs where nothing may be cut, a tensor without a source.
    """
    both = head_widths(teacher.spec), head_widths(student.spec)
    if both[0] != both[1]:
        raise ValueError(
            f"inherit: heads are kept whole; the teacher's have {both[0]} numbers, the student's "
            f"{both[1]}; set head_width of vision_cfg and heads of text_cfg so that they agree"
        )
    names = {canonical(name): name for name in student.tower.clip.state_dict()}
    given = {canonical(name): x for name, x in teacher.tower.clip.state_dict().items()}
    wanted = {name: student.tower.clip.state_dict()[own] for name, own in names.items()}
    layers = _layers(given, wanted, depth)
    sources = _sources(given, wanted, layers)
    axes = model_axes({name: tuple(x.shape) for name, x in given.items()}, both[0])
    sizes = _sizes(given, wanted, sources, axes)
    chosen = {group: _units(group, *size, scores) for group, size in sizes.items()}
    fates, tensors = [], {}
    for name, source in sources.items():
        value = given[source].detach()
        for dim, axis in enumerate(axes[source]):
            if axis is not None:
                value = value.index_select(dim, _places(axis, chosen[axis.group], value.shape[dim]))
        tensors[names[name]] = value.clone()
        fate: Fated = "kept" if value.shape == given[source].shape else "sliced"
        fates.append(
            Fate(names[name], source, fate, tuple(value.shape), tuple(given[source].shape))
        )
    taken = set(sources.values())
    left = [name for name in given if name not in taken]
    fates += [Fate("", name, "left", (), tuple(given[name].shape)) for name in left]
    available = {group: size[0] for group, size in sizes.items()}
    return Inheritance(tensors, fates, layers, chosen, available)


def unit_scores(
    weights: Mapping[str, Tensor], spec: TowerSpec, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The sum over each unit's gate of some value of every weight, by group, in float64.

    A factor g on a unit's output has the derivative ``dL/dg = sum w dL/dw`` over the gate's
    weights (first-order Taylor, Molchanov et al. 2019): give ``values = w * gradient``. With
    ``values = w ** 2`` it is the squared magnitude.

    Args:
        weights: of the model, by the names of its state dict.
        spec: what the weights are.
        values: one tensor for each parameter that has a value, shaped like it.
    """
    shapes = {canonical(name): tuple(x.shape) for name, x in weights.items()}
    axes = model_axes(shapes, head_widths(spec))
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        for dim, axis in enumerate(axes[canonical(name)]):
            if axis is None or not axis.gate:
                continue
            others = [d for d in range(value.dim()) if d != dim]
            total = value.double().sum(others) if others else value.double()
            # gates have no copies
            total = total.unflatten(0, (-1, axis.width)).sum(1)
            found[axis.group] = found.get(axis.group, 0) + total
    return found


def _layers(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], depth: Depth
) -> dict[str, list[int]]:
    """``layer_map`` of every stack of blocks of the student."""
    large, found = layer_counts(given), {}
    for stage, count in layer_counts(wanted).items():
        if stage not in large:
            raise ValueError(
                f"inherit: the student's {stage} has no source in the teacher; take a student with "
                "towers of the teacher's kind"
            )
        try:
            found[stage] = layer_map(large[stage], count, depth)
        except ValueError as error:
            raise ValueError(f"inherit: {stage}: {error}; take a shallower student") from None
    return found


def _sources(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], layers: Mapping[str, list[int]]
) -> dict[str, str]:
    """The teacher's tensor of each of the student's."""
    sources = {}
    for name in wanted:
        layer = split_layer(name)
        source = name
        if layer is not None:
            source = joined(layer._replace(number=layers[layer.stage][layer.number]))
        if source not in given:
            raise ValueError(
                f"inherit: the student's {name} has no source, the teacher has no {source}; take "
                "a student with towers of the teacher's kind"
            )
        sources[name] = source
    return sources


def _sizes(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    sources: Mapping[str, str],
    axes: Mapping[str, Axes],
) -> dict[str, tuple[int, int]]:
    """Of each group the teacher's number of units and the student's."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, source in sources.items():
        large, small = given[source].shape, wanted[name].shape
        for dim, axis in enumerate(axes[source]):
            if axis is None:
                if large[dim] != small[dim]:
                    raise ValueError(
                        f"inherit: {name}: axis {dim} is never cut; {large[dim]} of the teacher "
                        f"and {small[dim]} of the student came; give the student the teacher's "
                        "embedding width, vocabulary, context length, patch and image size"
                    )
                continue
            each = axis.width * axis.copies
            size = (large[dim] // each, small[dim] // each)
            if small[dim] % each or not 1 <= size[1] <= size[0]:
                raise ValueError(
                    f"inherit: {name}: {axis.group} has {size[0]} units of {each} numbers in the "
                    f"teacher; the student's {small[dim]} numbers are no smaller number of units"
                )
            if sizes.setdefault(axis.group, size) != size:
                raise ValueError(
                    f"inherit: {name}: {axis.group} has {sizes[axis.group][1]} units elsewhere in "
                    f"the student, {size[1]} here; the towers are not of the same kind"
                )
    return sizes


def _units(group: str, available: int, wanted: int, scores: Scores | None) -> Tensor:
    if scores is None or wanted == available:
        return torch.arange(wanted)
    # stable: of equal scores the first
    best = scores[group].cpu().sort(descending=True, stable=True).indices[:wanted]
    return best.sort().values


def _places(axis: Axis, units: Tensor, size: int) -> Tensor:
    """The indices along an axis of the units' numbers, in all copies."""
    return torch.arange(size).unflatten(0, (axis.copies, -1, axis.width))[:, units].flatten()
