# SPDX-License-Identifier: Apache-2.0
"""The teachers of a run: what they want of a batch, and what they say of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdengine.data import ViewSpec
from kdengine.models import Features, Teacher, TowerSpec
from kdengine.models.sizes import size_in_words

T = TypeVar("T")
# class texts in a forward pass
TEXTS = 256


class Teachers(Protocol):
    """What training asks of its teachers, wherever their embeddings come from.

    Attributes:
        specs: what each teacher is, in the order of the configuration.
    """

    specs: Sequence[TowerSpec]

    def views(self) -> dict[str, ViewSpec]:
        """Images that a batch must hold beside the student's ``image``, by name."""

    def tokenizers(self) -> dict[str, str]:
        """Tokenizer ids of tokens that a batch must hold beside the student's ``tokens``."""

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Features, ...]:
        """Each teacher's constant embeddings [b, E] of a batch, and its scale."""

    def checksum(self) -> int:
        """A number that changes with any teacher's weights and with their order."""

    def rows(self) -> dict[str, str]:
        """A line for each teacher in the run's header."""


class LiveTeachers:
    """Frozen models that embed each batch as it comes.

    A teacher that wants what the student wants reads ``image`` and ``tokens``. Other views are
    named ``teacher_image``, ``teacher_image_1``, ..., other tokens ``teacher_tokens``, ...; those
    who want the same share one.

    Args:
        teachers: in the order of the configuration.
        student: what the student is.
    """

    def __init__(self, teachers: Sequence[Teacher], student: TowerSpec) -> None:
        self.specs: Sequence[TowerSpec] = [teacher.spec for teacher in teachers]
        self._teachers = list(teachers)
        self._views = {"image": ViewSpec.like(student.preprocess)}
        self._tokenizers = {"tokens": student.tokenizer}
        self._keys = [
            (
                _key(self._views, ViewSpec.like(spec.preprocess), "teacher_image"),
                _key(self._tokenizers, spec.tokenizer, "teacher_tokens"),
            )
            for spec in self.specs
        ]

    def views(self) -> dict[str, ViewSpec]:
        """Images that a batch must hold beside the student's ``image``, by name."""
        return {name: wanted for name, wanted in self._views.items() if name != "image"}

    def tokenizers(self) -> dict[str, str]:
        """Tokenizer ids of tokens that a batch must hold beside the student's ``tokens``."""
        return {name: wanted for name, wanted in self._tokenizers.items() if name != "tokens"}

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Features, ...]:
        """Embed a batch by each teacher; see ``Teacher``."""
        return tuple(
            teacher(batch[image], batch[tokens])
            for teacher, (image, tokens) in zip(self._teachers, self._keys, strict=True)
        )

    def checksum(self) -> int:
        """Of one teacher its weights' ``checksum``; of several, their polynomial."""
        total = 0
        for teacher in self._teachers:
            total = total * 1_000_003 + checksum(teacher.tower)
        return total

    def rows(self) -> dict[str, str]:
        """A line for each teacher in the run's header."""
        several = len(self._teachers) > 1
        return {
            f"teacher {i}" if several else "teacher": f"{size(t.spec, t.tower)}, frozen"
            for i, t in enumerate(self._teachers, start=1)
        }


class ClassTeacher:
    """A frozen model that embeds images as they come, and the texts of their classes once.

    Nothing about those texts changes, while PromptKD's released trainer encodes them in each step.

    Args:
        teacher: the model.
        student: what the student is.
        class_tokens: [N, context], the texts.
        recompute: encode the texts in each step all the same.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: TowerSpec,
        class_tokens: Tensor,
        *,
        recompute: bool = False,
    ) -> None:
        self.specs: Sequence[TowerSpec] = [teacher.spec]
        self._teacher, self._tokens = teacher, class_tokens
        self._views = {"image": ViewSpec.like(student.preprocess)}
        self._key = _key(self._views, ViewSpec.like(teacher.spec.preprocess), "teacher_image")
        self.texts = self._encode()
        self._recompute = recompute
        self._scale = torch.tensor([teacher.scale()], device=self.texts.device)

    def views(self) -> dict[str, ViewSpec]:
        """Images that a batch must hold beside the student's ``image``, by name."""
        return {name: wanted for name, wanted in self._views.items() if name != "image"}

    def tokenizers(self) -> dict[str, str]:
        """None: a batch holds no tokens."""
        return {}

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Features, ...]:
        """Raw image embeddings [b, E], the unit ones of the texts [N, E] in fp32, the scale."""
        image = self._teacher.encode_image(batch[self._key])
        texts = self._encode() if self._recompute else self.texts
        # autograd refuses to save inference tensors; clones made out here are ordinary ones
        return (Features(image.clone(), texts, self._scale),)

    def checksum(self) -> int:
        """Of its weights."""
        return checksum(self._teacher.tower)

    def rows(self) -> dict[str, str]:
        """A line for the run's header."""
        told = "encoded in each step" if self._recompute else "encoded once"
        own = size(self._teacher.spec, self._teacher.tower)
        return {"teacher": f"{own}, frozen; {len(self._tokens)} class texts, {told}"}

    def _encode(self) -> Tensor:
        parts = [self._teacher.encode_text(part) for part in self._tokens.split(TEXTS)]
        return torch.cat([F.normalize(part.float(), dim=1).clone() for part in parts])


def _key(there: dict[str, T], wanted: T, name: str) -> str:
    """The name of ``wanted``; it gets one, after ``name``, if it has none yet."""
    for key, value in there.items():
        if value == wanted:
            return key
    others = len(there) - 1
    key = f"{name}_{others}" if others else name
    there[key] = wanted
    return key


def checksum(module: nn.Module) -> int:
    """Sum of the bit patterns of a module's floating point weights: equal on any device."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int(x.detach().contiguous().view(integers[x.itemsize]).sum(dtype=torch.int64))
        for x in module.state_dict().values()
        if x.is_floating_point()
    )


def size(spec: TowerSpec, tower: nn.Module) -> str:
    """One model in a few words."""
    pixels = spec.preprocess.size
    return f"{spec.label}: {size_in_words(tower)}, {pixels} px, width {spec.embed_dim}"
