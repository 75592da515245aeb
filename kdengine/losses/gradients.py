# SPDX-License-Identifier: Apache-2.0
"""GD, gradient distillation: the student's InfoNCE gradients follow the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses import inputs
from kdengine.losses.inputs import Scale
from kdengine.ops import gradient as gradient_op


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
    Gradients: image, text, scale; first order only. The teacher is a constant.
    Memory: O(N E) and strips; never N x N.
    Communication: one all-gather for the student, one for the teacher. Every rank computes the loss
    of the global batch, so all return the same; feature gradients are W times its own, for an
    averaging optimiser.
    Raises: ValueError or TypeError for shapes and dtypes that do not fit, an empty batch, or N
    that differs between ranks; RuntimeError for a backend that cannot run.
    Source: CLIP-KD eq. 13, with mean reduction. Its released code divides cosines by scale (a bug)
    and takes the two directions as four separate errors; see ``losses.quirks``.
    """
    x, y, u, v, scales = gather_pairs(
        "gradient",
        *(image, text, scale, teacher_image, teacher_text, teacher_scale),
        normalize=normalize,
        group=group,
    )
    ours = gradient_op(x, y, scales[0], backend=backend)
    with torch.no_grad():
        theirs = gradient_op(u, v, scales[1], backend=backend)
    return F.mse_loss(ours[0], theirs[0]) + F.mse_loss(ours[1], theirs[1])


def gather_pairs(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Checked features of the global batch, image and text of both, and both scales.

    Communication, raises: see ``gradient``.
    """
    student = inputs.check_features(who, image, text, scale, normalize=normalize)
    inputs.check_constant(who, teacher_image=teacher_image, teacher_text=teacher_text)
    teacher = inputs.check_features(
        who, teacher_image, teacher_text, teacher_scale, normalize=normalize
    )
    for name, x in (("text", text), ("teacher_image", teacher_image)):
        if x.shape != image.shape:
            raise ValueError(
                f"{who}: image is {tuple(image.shape)} but {name} is {tuple(x.shape)}; all need "
                "the same rows and width; project the student into the teacher's width first"
            )
    exchange = Exchange.over(group)
    numbers = {"image": len(image), "bytes of a row that travels": 0}
    for z in (*student[:2], *teacher[:2]):
        numbers["bytes of a row that travels"] += z.shape[1] * z.itemsize
    by_name = exchange.gather_numbers(numbers, image.device)
    distributed.require_even(who, "image", by_name.pop("image"))
    for name, values in by_name.items():
        distributed.require_same(who, name, values)
    if len(image) == 0:
        raise ValueError(f"{who}: image and text need at least one row; skip an empty batch")
    # image and text in one buffer
    x, y = distributed.gather_rows(torch.cat(student[:2], 1), exchange.group).chunk(2, 1)
    u, v = distributed.gather_constant(torch.cat(teacher[:2], 1), exchange.group).chunk(2, 1)
    return x, y, u, v, (student.scale, teacher.scale)
