# SPDX-License-Identifier: Apache-2.0
"""CLIP-KD as its released code has it, where that differs from the paper.

Source: github.com/winycg/CLIP-KD at f3ae18b; for reproduction, not for training. Method clip_kd
with ``reference_quirks`` reproduces, to 1e-6 of a transcription of the formulas:

    released code                                  effect
    ---------------------------------------------  ------------------------------------------------
    ICL and AFD multiply by the parameter itself,  it starts at 2.66 (a temperature of 0.38 instead
    not by its exp, and never clamp it             of 0.07) and moves by about lr a step: tens of
                                                   thousands of steps to 50, soft in a short run
    GD divides cosines by the scale                softmaxes almost uniform: 1e8 GD is 0.0037 at
                                                   first (batch 1024, width 512; else about 150),
                                                   its gradient 3e-4 of InfoNCE's: it does nothing
    GD adds four errors, one for each direction    not the error of the whole gradient
    and modality
    MFD overwrites the masked embedding            MFD is FD; its extra pass is not made here

Its halved CRD and FD's mean over the width are the reductions of clip_kd in any case. Not
reproduced:

    released code                                  here
    ---------------------------------------------  ------------------------------------------------
    AFD crashes where the widths differ            refused with ``reference_quirks``
    one process and --local-loss crash             the same loss for any number of ranks
    the gather has no gradient: encoders get 1/W   the loss's own gradient: AdamW divides a factor
    of it, the scale all of it                     out, but for eps, as if eps were W times larger
                                                   (--optim.eps); the logged norm is W times theirs
    every rank draws heads and fusions of its own  one set, synchronised, in every checkpoint; heads
    and never synchronises them; they and scales   decay as other weights, scales do not
    decay by 0.01, and are in no checkpoint
    Cross-KD, of weight 0 in every script          left out, as in the paper
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdengine import distributed
from kdengine.distributed import Exchange, Group
from kdengine.losses.gradients import check_pairs
from kdengine.losses.inputs import Scale

# similarities in a strip: 32 MiB in fp32, of which a few lie in memory at a time
CELLS = 8 << 20


def released_gradient(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Scale,
    *,
    normalize: bool = False,
    group: Group | Exchange = None,
) -> Tensor:
    """GD of the released code: four errors of gradients whose softmaxes divide by the scale.

    ``sum 1/(N E) ||g - g^teacher||^2`` over g in ``{g_x, g_y}(image, text), {g_x, g_y}(text,
    image)``, with ``g_x(x, y) = (P - I) y / (scale N)``, ``g_y(x, y) = (P - I)^T x / (scale N)``,
    P = rowsoftmax(x y^T / scale)

    Shapes: image, text, teacher_image, teacher_text (N, E): the student in the teacher's width;
    L2-normalised rows unless ``normalize``.
    Returns: 0-D, float64 if a feature is, else float32.
    Gradients: image, text, scale. The teacher is a constant.
    Memory: O(N E) and a strip of ``CELLS`` similarities, which the backward computes again.
    Communication: one all-gather for the student, one for the teacher; every rank computes the loss
    of the global batch.
    Raises: as ``losses.gradient``, whose paper's form it is not.
    """
    student, teacher, exchange = check_pairs(
        "released_gradient",
        *(image, text, scale, teacher_image, teacher_text, teacher_scale),
        normalize=normalize,
        group=group,
    )
    # image and text in one buffer
    x, y = distributed.gather_rows(torch.cat(student[:2], 1), exchange.group).chunk(2, 1)
    u, v = distributed.gather_constant(torch.cat(teacher[:2], 1), exchange.group).chunk(2, 1)
    dtype, scales = student.dtype, (student.scale, teacher.scale)
    x, y, u, v = (z.to(dtype) for z in (x, y, u, v))
    with torch.autocast(x.device.type, enabled=False):
        ours = [*one_direction(x, y, scales[0]), *one_direction(y, x, scales[0])]
        with torch.no_grad():
            theirs = [*one_direction(u, v, scales[1]), *one_direction(v, u, scales[1])]
        errors = [F.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(errors).sum()


def one_direction(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean cross-entropy of rows, softmax(query key^T / temperature), at both.

    Shapes: query, key (N, E), temperature 0-D. Returns: (N, E) twice.
    """
    height = max(1, CELLS // len(key))
    pulled, pushed = [], torch.zeros_like(key)
    for rows in query.split(height):
        own, others = checkpoint(
            strip, rows, key, temperature, use_reentrant=False, preserve_rng_state=False
        )
        pulled.append(own)
        pushed = pushed + others
    rate = 1 / (temperature * len(key))
    return rate * (torch.cat(pulled) - key), rate * (pushed - query)


def strip(rows: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """P key and P^T rows for some rows of P."""
    probability = (rows @ key.mT / temperature).softmax(1)
    return probability @ key, probability.mT @ rows
