# SPDX-License-Identifier: Apache-2.0
"""GD, gradient distillation: the student's InfoNCE gradients follow the teacher's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Features, Scale
from kdengine.losses.sweep import eager_over_ranks
from kdengine.ops import gradient as gradient_op
from kdengine.ops._backend import check_name, refuse_create_graph
from kdengine.ops.gradient_blocks import backward, forward


def gradient(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Scale,
    *,
    normalize: bool = False,
    group: Group | Exchange = None,
    backend: str = "auto",
) -> Tensor:
    """GD: the gradients of InfoNCE at the student's embeddings match those at the teacher's.

    ``1/(N E) [||g_image - g_image^teacher||^2 + ||g_text - g_text^teacher||^2]``, with
    ``g_image = scale/N G text``, ``G = 1/2 (P - I) + 1/2 (Q - I)``; see ``kdengine.ops.gradient``.

    Shapes: image, text, teacher_image, teacher_text (N, E): the student in the teacher's width;
    L2-normalised rows unless ``normalize``.
    Returns: 0-D, float64 if a feature is, else float32; it falls as 1/N^2 when the batch grows.
    With a group that of this rank's pairs; the mean over ranks is the loss.
    Gradients: image, text, scale; first order only. The teacher is a constant. Feature gradients
    are W times those of the loss, for an averaging optimiser.
    Memory: O(N E) and strips; never N x N.
    Communication, on each rank of n x E: texts out, gradients of texts home, of student and
    teacher; in the backward the upstream gradient of the text's out, the text's gradient home; and
    four numbers a column.
    Raises: ValueError or TypeError for shapes and dtypes that do not fit, an empty batch, or N
    that differs between ranks; RuntimeError for a backend that cannot run.
    Source: CLIP-KD eq. 13, with mean reduction. Its released code divides cosines by scale (a bug)
    and takes the two directions as four separate errors; see ``losses.quirks``.
    """
    check_name("gradient", backend)
    student, teacher, exchange = check_pairs(
        "gradient",
        *(image, text, scale, teacher_image, teacher_text, teacher_scale),
        normalize=normalize,
        group=group,
    )
    return _matched(student, teacher, group=exchange, backend=backend)


@eager_over_ranks
def _matched(student: Features, teacher: Features, *, group: Exchange, backend: str) -> Tensor:
    if group.world_size == 1:
        ours = gradient_op(*student[:3], backend=backend)
        with torch.no_grad():
            theirs = gradient_op(*teacher[:3], backend=backend)
    else:
        ours = _Spread.apply(*student[:3], group, backend)
        image, text, scale, *_ = teacher
        with torch.no_grad():
            theirs = forward(image, group.gather(text), scale, group, backend)[:2]
    return F.mse_loss(ours[0], theirs[0]) + F.mse_loss(ours[1], theirs[1])


class _Spread(torch.autograd.Function):
    """The op ``gradient`` over ranks: this rank's rows of both gradients."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, exchange: Exchange, backend: str
    ) -> tuple[Tensor, Tensor]:
        texts = exchange.gather(text)
        grad_image, grad_text, rows, cols = forward(image, texts, scale, exchange, backend)
        kept = text if exchange.regather else texts
        ctx.save_for_backward(image, kept, scale, rows, cols, grad_image, grad_text)
        ctx.exchange, ctx.backend = exchange, backend
        return grad_image, grad_text

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        refuse_create_graph("gradient")
        exchange: Exchange = ctx.exchange
        image, kept, scale, rows, cols, *grads = ctx.saved_tensors
        texts = exchange.gather(kept) if exchange.regather else kept
        *of_features, of_scale = backward(
            upstream, image, texts, scale, rows, cols, grads, exchange, ctx.backend
        )
        found = (*of_features, of_scale.to(scale.dtype))
        needs = ctx.needs_input_grad[:3]
        return (*(v if need else None for v, need in zip(found, needs, strict=True)), None, None)


def check_pairs(
    who: str,
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Scale,
    *,
    normalize: bool,
    group: Group | Exchange,
) -> tuple[Features, Features, Exchange]:
    """Checked features of this rank, student's and teacher's, and how they travel.

    Raises: see ``gradient``.
    """
    student = inputs.check_features(who, image, text, scale, normalize=normalize)
    inputs.check_constant(who, teacher_image=teacher_image, teacher_text=teacher_text)
    teacher = inputs.check_features(
        who, teacher_image, teacher_text, teacher_scale, normalize=normalize
    )
    inputs.check_constant(who, teacher_scale=teacher.scale)
    for name, x in (("text", text), ("teacher_image", teacher_image)):
        if x.shape != image.shape:
            raise ValueError(
                f"{who}: image is {tuple(image.shape)} but {name} is {tuple(x.shape)}; all need "
                "the same rows and width; project the student into the teacher's width first"
            )
    exchange = Exchange.over(group)
    learns = torch.is_grad_enabled() and any(z.requires_grad for z in student[:3])
    numbers = {
        "image": len(image),
        "bytes of a row that travels": sum(
            z.shape[1] * z.itemsize for z in (*student[:2], *teacher[:2])
        ),
        "gradient of what travels": int(learns),
        "regather": int(exchange.regather),
        "per_node": exchange.per_node,
    }
    by_name = exchange.gather_numbers(numbers, image.device)
    distributed.require_even(who, "image", by_name.pop("image"))
    for name, values in by_name.items():
        distributed.require_same(who, name, values)
    if len(image) == 0:
        raise ValueError(f"{who}: image and text need at least one row; skip an empty batch")
    return student, teacher, exchange
