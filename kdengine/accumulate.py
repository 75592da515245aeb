# SPDX-License-Identifier: Apache-2.0
"""Exact batches beyond memory: the gradient cache, for a loss that needs all pairs at once.

A step of k micro-batches, with one loss over the pairs of all, on all ranks:

    embed   micro-batches 1 to k-1, without a graph
    loss    of all k, with the graph of micro-batch k alone; its backward pass gives the gradients
            of heads and scales, of the towers by micro-batch k, and of the others' embeddings
    replay  micro-batches 1 to k-1 once more, each with a graph and from the random state it was
            embedded in, so that dropout and masks repeat; the gradients of its embeddings go on
            into the towers

So the gradient is that of one batch of all pairs, for 2k - 1 forward passes of the student, one of
its teachers a micro-batch, and k backward passes. With k = 1 nothing of this happens.

DeepSpeed's part: the backward passes add up, and only the last is a boundary of accumulation; its
own ``gradient_accumulation_steps`` stay 1, as it divides by them. The loss goes first, as every
weight must have a gradient in the first backward pass: under ZeRO-3 that one writes over the
gradients of the step before, and the others add. ZeRO 2 and 3 reduce gradients in each backward
pass, 0 and 1 in the last.

Batch norms take their statistics from a micro-batch, in both passes alike; the running ones are
updated in the first pass, and the replay leaves them as they are.

Memory: activations of one micro-batch; embeddings of student and teachers, and gradients of the
student's, for k micro-batches; images and tokens of k - 1 in the memory of the host.

Source: Gao et al. 2021, arXiv 2101.06983. There all k are embedded without a graph and replayed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdengine import checkpoint
from kdengine.centres import Drawn
from kdengine.data.clusters import STORED
from kdengine.methods import Embeddings, joined
from kdengine.models import Features
from kdengine.optimizer import Buffers
from kdengine.teachers import Teachers

Batch = dict[str, Tensor]


class _Embedded(NamedTuple):
    """A micro-batch that waits for its replay."""

    image: Tensor
    tokens: Tensor
    random: dict[str, Any]


class Accumulation:
    """The passes of one step.

    Args:
        engine: the training engine around ``methods.Distillation``.
        teachers: what embeds a micro-batch beside the student; None without.
        accum_freq: the number of micro-batches.
        draw: gives the clusters of a step from those of its images; None without.
    """

    def __init__(
        self,
        engine: Any,
        teachers: Teachers | None,
        accum_freq: int,
        draw: Callable[[Sequence[Batch]], Drawn] | None = None,
    ) -> None:
        self._engine, self._teachers, self._accum_freq = engine, teachers, accum_freq
        self._draw = draw
        self._waiting: list[_Embedded] = []
        self._earlier: Embeddings | None = None

    def forward(
        self, load: Callable[[], Batch], diagnose: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step, and its terms; see ``methods.Distillation``.

        Args:
            load: gives the next micro-batch.
            diagnose: measure the likeness of student and teachers too.
        """
        by_teachers, by_student, clusters = [], [], []
        for _ in range(self._accum_freq - 1):
            batch = load()
            clusters.append(self._clusters(batch))
            by_teachers.append(self._teach(batch))
            by_student.append(self._embed(batch))
        batch = load()
        clusters.append(self._clusters(batch))
        # the host waits for the numbers of a sample: before this batch's teachers are queued
        more = {} if self._draw is None else {"drawn": self._draw(clusters)}
        by_teachers.append(self._teach(batch))
        teachers = [_together(each) for each in zip(*by_teachers, strict=True)]
        if by_student:
            self._earlier = joined(by_student)
            for leaf in self._earlier:
                if leaf is not None:
                    leaf.requires_grad_()
        wanted = [batch[name] for name in self._engine.module.wants]
        return self._engine(*wanted, teachers, diagnose, self._earlier, **more)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss that ``forward`` returned, or of a multiple of it."""
        if self._earlier is None:
            self._engine.backward(loss)
            return
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(loss)
        gradients = [None if x is None else x.grad for x in self._earlier]
        size = len(self._waiting[0].image)
        after, buffers = checkpoint.random_state(), Buffers(self._engine.module)
        for number, waiting in enumerate(self._waiting):
            rows = slice(number * size, (number + 1) * size)
            own = [None if gradient is None else gradient[rows] for gradient in gradients]
            self._engine.set_gradient_accumulation_boundary(number == len(self._waiting) - 1)
            self._replay(waiting, own)
            buffers.restore()
        checkpoint.set_random_state(after)

    def _clusters(self, batch: Batch) -> Batch:
        """What a batch says of its images' clusters."""
        return {name: batch[name] for name in STORED if name in batch} if self._draw else {}

    def _teach(self, batch: Batch) -> Sequence[Features]:
        return self._teachers(batch) if self._teachers else ()

    @torch.no_grad()
    def _embed(self, batch: Batch) -> Embeddings:
        """The embeddings of a micro-batch, which is kept for its replay."""
        # a copy to the host is asynchronous and pinned where there is a device, and none elsewhere
        image, tokens = (batch[name].to("cpu", non_blocking=True) for name in ("image", "tokens"))
        self._waiting.append(_Embedded(image, tokens, checkpoint.random_state()))
        return self._engine(batch["image"], batch["tokens"], only_embed=True)

    def _replay(self, waiting: _Embedded, gradients: Sequence[Tensor | None]) -> None:
        device = self._engine.device
        image, tokens = (x.to(device, non_blocking=True) for x in waiting[:2])
        checkpoint.set_random_state(waiting.random)
        product = self._engine(image, tokens, replay=gradients)
        self._engine.backward(product)


def _together(parts: Sequence[Features]) -> Features:
    """One teacher's features of several micro-batches."""
    if len(parts) == 1:
        return parts[0]
    images, texts, scales = zip(*parts, strict=True)
    return Features(torch.cat(images), torch.cat(texts), scales[0])
