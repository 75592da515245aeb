# SPDX-License-Identifier: Apache-2.0
"""Checks of a loss's arguments, once, with messages that say what to do; no host synchronisation.

Values of labels are checked on the CPU only: on a GPU a positive that does not exist makes its
term infinite.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = float | Tensor
Teachers = Tensor | Sequence[Tensor] | None
TeacherScales = Scale | Sequence[Scale] | None
KEYS = ("gathered", "replicated", "sharded")


class Features(NamedTuple):
    """Checked features: scales are 0-D (K for teachers) tensors of ``dtype``, the losses' dtype."""

    query: Tensor
    key: Tensor
    scale: Tensor
    teacher_query: list[Tensor]
    teacher_key: list[Tensor]
    teacher_scale: Tensor
    dtype: torch.dtype


def check_features(
    who: str,
    query: Tensor,
    key: Tensor,
    scale: Scale,
    teacher_query: Teachers = None,
    teacher_key: Teachers = None,
    teacher_scale: TeacherScales = None,
    normalize: bool = False,
) -> Features:
    """Check shapes, dtypes and devices; normalise rows if asked to."""
    check_pair(who, "query", query, "key", key)
    queries, keys, scales = _teachers(who, teacher_query, teacher_key, teacher_scale)
    for u, v in zip(queries, keys, strict=True):
        check_constant(who, teacher_query=u, teacher_key=v)
        check_pair(who, "teacher_query", u, "teacher_key", v)
        if len(u) != len(query) or len(v) != len(key) or u.device != query.device:
            raise ValueError(
                f"{who}: a teacher has the rows and the device of the student; teacher_query "
                f"{_show(u)} and teacher_key {_show(v)} came for query {_show(query)} and key "
                f"{_show(key)}"
            )
    everything = [query, key, *queries, *keys]
    is_double = any(x.dtype == torch.float64 for x in everything)
    dtype = torch.float64 if is_double else torch.float32
    if normalize:
        query, key = unit_rows(query), unit_rows(key)
        queries, keys = ([unit_rows(x) for x in found] for found in (queries, keys))
    number = check_scale(who, "scale", scale, query.device).to(dtype)
    numbers = [check_scale(who, "teacher_scale", r, query.device).to(dtype) for r in scales]
    for number_k in numbers:
        check_constant(who, teacher_scale=number_k)
    stacked = torch.stack(numbers) if numbers else number.new_empty(0)
    return Features(query, key, number, queries, keys, stacked.detach(), dtype)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, from norms in float32 at least.

    They are rounded to the dtype they came in, so that products of low precision features run at
    the speed of that precision. Losses that share rows share one normalisation by it: normalise
    once, and leave out ``normalize``.

    Shapes: (N, D), both. Gradients: x.
    """
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).to(x.dtype)


def check_pair(who: str, left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    """Two lists of feature rows of one width on one device."""
    for name, x in ((left_name, left), (right_name, right)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{who}: {name} needs to be a floating point tensor; {what} came")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{who}: {name} needs the shape (rows, width); {_show(x)} came")
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"{who}: {left_name} is {_show(left)} but {right_name} is {_show(right)}; both need "
            "the same width. Did you forget the projection head?"
        )
    if left.device != right.device:
        raise ValueError(
            f"{who}: {left_name} and {right_name} need one device; {left.device} and "
            f"{right.device} came"
        )


def check_constant(who: str, **tensors: Tensor) -> None:
    """Refuse tensors that expect a gradient which the loss does not give."""
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{who}: {name} is a constant of the loss, but it requires a gradient; run the "
                f"teacher under torch.no_grad() or pass {name}.detach()"
            )


def check_scale(who: str, name: str, scale: Scale, device: torch.device) -> Tensor:
    """A float, 0-D or [1] tensor as a 0-D tensor; the gradient flows."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                f"{who}: {name} is one floating point number; a tensor of shape "
                f"{tuple(scale.shape)} and {scale.dtype} came"
            )
        return scale.reshape(()).to(device)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{who}: {name} is a float or a tensor; {type(scale).__name__} came")
    return torch.full((), float(scale), dtype=torch.float64, device=device)


def check_labels(who: str, name: str, labels: Tensor, size: int, limit: int) -> None:
    """One int64 number below ``limit`` for each of ``size`` rows."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{who}: {name} needs to be an int64 tensor; {what} came")
    if labels.shape != (size,):
        raise ValueError(
            f"{who}: {name} needs one number for each of {size}; shape {tuple(labels.shape)} came"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{who}: {name} are numbers in 0..{limit - 1}; {low}..{high} came")


def check_keys(who: str, keys: str) -> None:
    """Raise ValueError unless ``keys`` says how the key rows lie over the ranks."""
    if keys not in KEYS:
        raise ValueError(f"{who}: keys is one of {KEYS}; {keys!r} came")


def _teachers(
    who: str, query: Teachers, key: Teachers, scale: TeacherScales
) -> tuple[list[Tensor], list[Tensor], list[Scale]]:
    parts: list[list[Any]] = [
        [] if x is None else list(x) if isinstance(x, list | tuple) else [x]
        for x in (query, key, scale)
    ]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"{who}: teacher_query, teacher_key and teacher_scale come together, one each or "
            f"tuples of one length; {', '.join(str(len(part)) for part in parts)} came"
        )
    return parts[0], parts[1], parts[2]


def _show(x: Tensor) -> str:
    return str(tuple(x.shape))
