# SPDX-License-Identifier: Apache-2.0
"""What a method that learns from images of known classes is, and the root module around it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdengine.methods.base import kept_weights, teacher_missing, weighted_sum
from kdengine.models import Features, TwoTower


class ClassMethod(nn.Module, ABC):
    """Turns images and the texts of their classes into loss terms.

    What is learned, prompts and heads, belongs to the student: it is part of every export.

    Attributes:
        weights: weight of each term; a term of weight 0 does not appear in it.
        needs_teacher: whether ``forward`` wants a teacher's features.
        pinned_scale: None: the scale of a frozen student is its own.
    """

    needs_teacher: bool = True
    pinned_scale: None = None

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = kept_weights(type(self).__name__, weights)

    @abstractmethod
    def forward(
        self, student: TwoTower, image: Tensor, label: Tensor, teachers: Sequence[Features]
    ) -> dict[str, Tensor]:
        """The unweighted scalar terms, one for each name in ``weights``.

        Shapes: image [b, 3, S, S]; label [b], the number of each image's class among N; of each
            teacher ``image`` [b, E] and ``text`` [N, E], the unit embeddings of the classes' texts.

        Further scalars, worth a place in the log, may stand beside them under other names.
        """


class ClassDistillation(nn.Module):
    """A student with prompts and a method in one module, as ``Distillation`` is for pairs.

    Attributes:
        wants: the tensors of a batch that ``forward`` takes, by their names.
    """

    wants = ("image", "label")

    def __init__(self, student: TwoTower, method: ClassMethod) -> None:
        super().__init__()
        self.student = student
        self.method = method

    def forward(
        self,
        image: Tensor,
        label: Tensor,
        teachers: Sequence[Features] = (),
        diagnose: bool = False,
        earlier: None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """One step's loss ``sum_k weights[k] * terms[k]``, and the detached unweighted terms.

        Shapes: see ``ClassMethod.forward``.

        Args:
            image: the images.
            label: of their classes.
            teachers: their features.
            diagnose: the method has nothing more to say than it says in every step.
            earlier: steps of several micro-batches are refused by the configuration.

        Returns:
            The loss of this rank's rows, fp32, in nats (the mean over ranks is the loss of the
            global batch), and the terms, with the student's ``scale``.

        Raises:
            ValueError: the method needs a teacher and none was given.
        """
        assert earlier is None
        if self.method.needs_teacher and not teachers:
            raise teacher_missing(type(self.method).__name__)
        terms: dict[str, Tensor] = self.method(self.student, image, label, teachers)
        logged = {name: term.detach() for name, term in terms.items()}
        logged["scale"] = self.student.scale().detach().squeeze()
        return weighted_sum(self.method.weights, terms), logged

    def log_scales(self) -> list[nn.Parameter]:
        """None: the scale is as frozen as the towers."""
        return []
