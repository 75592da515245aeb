# SPDX-License-Identifier: Apache-2.0
"""What a method is, and the one root module that the training engine sees."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kdengine.methods.likeness import Heads, first_outputs, likeness
from kdengine.models import Features, TwoTower
from kdengine.models.masking import install_mask


def teacher_missing(name: str) -> ValueError:
    """The error of a method that needs a teacher and has none."""
    return ValueError(
        f"method {name}: expected a teacher, got none; name one with --distill.distill-model, "
        "give a cache with --distill.cache, or use --method.name clip"
    )


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
        negative = {name: weight for name, weight in weights.items() if weight < 0}
        if negative:
            raise ValueError(
                f"{type(self).__name__}: a weight is at least 0; {negative} came; a term of weight "
                "0 is left out"
            )
        self.weights = {name: weight for name, weight in weights.items() if weight != 0}
        if not self.weights:
            raise ValueError(
                f"{type(self).__name__}: every weight is 0 ({dict(weights)}); "
                "set at least one term's weight above 0"
            )

    @abstractmethod
    def forward(
        self, student: Features, teachers: Sequence[Features], masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The unweighted scalar terms, one for each name in ``weights``.

        ``teachers`` are in the order of the configuration; none where the method needs none.
        ``masked`` is the student's raw embedding [b, D] of masked images, with ``mask_ratio``.

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


class Distillation(nn.Module):
    """Student, heads and learnable scales in one module, so that ZeRO knows every parameter."""

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step's loss.

        Formula: ``loss = sum_k weights[k] * terms[k]``, the only place where terms are weighted.

        Shapes: image [b, 3, S, S], tokens [b, context], each teacher's embeddings [b, E].

        Returns:
            The loss of this rank's rows and columns, fp32, in nats (the mean over ranks is the
            loss of the global batch), and the detached unweighted terms, with the student's
            exponentiated scale under the name ``scale``, and with ``diagnose`` the ``likeness`` of
            student and teachers.

        Raises:
            ValueError: the method needs a teacher and none was given.
        """
        if self.method.needs_teacher and not teachers:
            raise teacher_missing(type(self.method).__name__)
        ratio, mask_all = self.method.mask_ratio, self.method.mask_all
        student: Features = self.student(image, tokens, ratio if mask_all else 0.0)
        masked = None
        if ratio:
            masked = student.image if mask_all else self.student.encode_image(image, ratio)
        heads = [self.method.heads(n) for n in range(len(teachers))] if diagnose else []
        with first_outputs(head for pair in heads if pair for head in pair[:2]) as seen:
            terms: dict[str, Tensor] = self.method(student, teachers, masked)
        weighted = [weight * terms[name] for name, weight in self.method.weights.items()]
        logged = {name: term.detach() for name, term in terms.items()}
        logged["scale"] = student.scale.detach().squeeze()
        if diagnose:
            projected = [pair.project(seen) if pair else student[:2] for pair in heads]
            logged |= likeness(student, teachers, projected)
        return sum(weighted[1:], weighted[0]), logged

    def log_scales(self) -> list[nn.Parameter]:
        """The log scales of student and method to be kept within [0, ln 100]."""
        own = [self.student.log_scale] if self.method.pinned_scale is None else []
        return [*own, *self.method.log_scales()]
