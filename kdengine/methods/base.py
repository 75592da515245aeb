# SPDX-License-Identifier: Apache-2.0
"""What a method is, and the one root module that the training engine sees."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdengine.centres import Drawn
from kdengine.methods.likeness import Heads, first_outputs, likeness
from kdengine.models import Features, TwoTower
from kdengine.models.masking import install_mask


def teacher_missing(name: str) -> ValueError:
    """The error of a method that needs a teacher and has none."""
    return ValueError(
        f"method {name}: expected a teacher, got none; name one with --distill.distill-model, "
        "give a cache with --distill.cache, or use --method.name clip"
    )


def kept_weights(who: str, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that are not 0.

    Raises:
        ValueError: one is negative, or all are 0.
    """
    negative = {name: weight for name, weight in weights.items() if weight < 0}
    if negative:
        raise ValueError(
            f"{who}: a weight is at least 0; {negative} came; a term of weight 0 is left out"
        )
    kept = {name: weight for name, weight in weights.items() if weight != 0}
    if not kept:
        raise ValueError(
            f"{who}: every weight is 0 ({dict(weights)}); set at least one term's weight above 0"
        )
    return kept


def weighted_sum(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    """``sum_k weights[k] * terms[k]``, the only place where terms are weighted."""
    weighted = [weight * terms[name] for name, weight in weights.items()]
    return sum(weighted[1:], weighted[0])


class Method(nn.Module, ABC):
    """Turns student and teacher features into loss terms; owns the heads and scales it learns.

    Attributes:
        weights: weight of each term that is computed; a term of weight 0 does not appear in it.
        needs_teacher: whether ``forward`` wants teacher features.
        mask_ratio: share of the student's patches that its masked image embedding lacks; 0 asks
            for none.
        mask_all: the student's image embedding is the masked one, in all terms.
        pinned_scale: what the student's scale is, from the first step to the export; None leaves
            it to be learned.
    """

    needs_teacher: bool = True
    mask_ratio: float = 0.0
    mask_all: bool = False
    pinned_scale: float | None = None

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = kept_weights(type(self).__name__, weights)

    @abstractmethod
    def forward(
        self, student: Features, teachers: Sequence[Features], masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The unweighted scalar terms, one for each name in ``weights``.

        ``teachers`` are in the order of the configuration; none where the method needs none.
        ``masked`` is the student's raw embedding [b, D] of masked images, with ``mask_ratio``. A
        method of clusters takes ``drawn`` as well, those of the step.

        Further scalars, worth a place in the log, may stand beside them under other names.
        """

    def heads(self, teacher: int) -> Heads | None:
        """What brings the student's embeddings into a teacher's space, to log their cosine there.

        ``forward`` calls each, first with the student's own embeddings. None where it compares
        nothing there.
        """
        return None

    def log_scales(self) -> list[nn.Parameter]:
        """Learnable log scales to be kept within [0, ln 100] after every optimiser step."""
        return []


class Embeddings(NamedTuple):
    """What the loss needs of the student's towers for n pairs: raw embeddings [n, D].

    ``masked`` is None unless the method compares masked images beside the whole ones.
    """

    image: Tensor
    text: Tensor
    masked: Tensor | None


Gradients = Sequence[Tensor | None]


class Distillation(nn.Module):
    """Student, heads and learnable scales in one module, so that ZeRO knows every parameter.

    Whatever part of a step is computed, this module's forward computes it, so that ZeRO-3 fetches
    the weights.

    Attributes:
        wants: the tensors of a batch that ``forward`` takes, by their names.
    """

    wants = ("image", "tokens")

    def __init__(self, student: TwoTower, method: Method) -> None:
        super().__init__()
        self.student = student
        self.method = method
        if method.pinned_scale is not None:
            student.pin_scale(method.pinned_scale)
        if method.mask_ratio:
            install_mask(student.clip.visual)  # type: ignore[arg-type]

    def forward(
        self,
        image: Tensor,
        tokens: Tensor,
        teachers: Sequence[Features] = (),
        diagnose: bool = False,
        earlier: Embeddings | None = None,
        drawn: Drawn | None = None,
        *,
        only_embed: bool = False,
        replay: Gradients | None = None,
    ) -> Any:
        """One step's loss, or the part of it that belongs to the towers.

        Formula: ``loss = sum_k weights[k] * terms[k]``.

        Shapes: image [b, 3, S, S], tokens [b, context], each teacher's embeddings [b, E], or
            [n + b, E] after n ``earlier`` ones.

        Args:
            image: the images.
            tokens: of their captions.
            teachers: their features.
            diagnose: measure likeness too.
            earlier: the student's embeddings of n pairs of this step that went before; the loss
                is that of all n + b.
            drawn: the clusters that the step looks at, and those of its images.
            only_embed: return the ``Embeddings`` of this batch, and nothing else.
            replay: a loss's gradients with respect to this batch's ``Embeddings``; return the sum
                of the products of both, a scalar whose gradient in the towers is that of the loss.

        Returns:
            The loss of this rank's rows and columns, fp32, in nats (the mean over ranks is the
            loss of the global batch), and the detached unweighted terms, with the student's
            exponentiated scale under the name ``scale``, and with ``diagnose`` the ``likeness`` of
            student and teachers.

        Raises:
            ValueError: the method needs a teacher and none was given.
        """
        if only_embed or replay is not None:
            own, _ = self._embed(image, tokens)
            return own if replay is None else _product(own, replay)
        if self.method.needs_teacher and not teachers:
            raise teacher_missing(type(self.method).__name__)
        own, scale = self._embed(image, tokens)
        if earlier is not None:
            own = joined([earlier, own])
        student = Features(own.image, own.text, scale)
        masked = own.image if self.method.mask_all else own.masked
        heads = [self.method.heads(n) for n in range(len(teachers))] if diagnose else []
        with first_outputs(head for pair in heads if pair for head in pair[:2]) as seen:
            more = {} if drawn is None else {"drawn": drawn}
            terms: dict[str, Tensor] = self.method(student, teachers, masked, **more)
        logged = {name: term.detach() for name, term in terms.items()}
        logged["scale"] = student.scale.detach().squeeze()
        if diagnose:
            projected = [pair.project(seen) if pair else student[:2] for pair in heads]
            logged |= likeness(student, teachers, projected)
        return weighted_sum(self.method.weights, terms), logged

    def _embed(self, image: Tensor, tokens: Tensor) -> tuple[Embeddings, Tensor]:
        """The student's embeddings, and its scale."""
        ratio, mask_all = self.method.mask_ratio, self.method.mask_all
        student: Features = self.student(image, tokens, ratio if mask_all else 0.0)
        beside = ratio and not mask_all
        masked = self.student.encode_image(image, ratio) if beside else None
        return Embeddings(student.image, student.text, masked), student.scale

    def log_scales(self) -> list[nn.Parameter]:
        """The log scales of student and method to be kept within [0, ln 100]."""
        own = [self.student.log_scale] if self.method.pinned_scale is None else []
        return [*own, *self.method.log_scales()]


def joined(parts: Sequence[Embeddings]) -> Embeddings:
    """The rows of all parts, one after the other."""
    images, texts, masked = zip(*parts, strict=True)
    return Embeddings(
        torch.cat(images), torch.cat(texts), None if masked[0] is None else torch.cat(masked)
    )


def _product(embeddings: Embeddings, gradients: Gradients) -> Tensor:
    """The scalar whose gradient with respect to the embeddings is ``gradients``; None is 0."""
    pairs = zip(embeddings, gradients, strict=True)
    products = [(x * g).sum() for x, g in pairs if x is not None and g is not None]
    return sum(products[1:], products[0])
