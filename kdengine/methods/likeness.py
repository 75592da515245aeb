# SPDX-License-Identifier: Apache-2.0
"""How alike student and teachers embed a batch, for the log."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from kdengine.diagnostics import MIN_ROWS, linear_cka, mean_cosine
from kdengine.models import Features

MODALITIES = ("image", "text")


class Heads(NamedTuple):
    """Modules that bring the student's embeddings into a teacher's space, and its columns there."""

    image: nn.Module
    text: nn.Module
    columns: slice = slice(None)

    def project(self, outputs: Mapping[nn.Module, Tensor]) -> tuple[Tensor, Tensor]:
        """The student's image and text embeddings in the teacher's space."""
        return outputs[self.image][:, self.columns], outputs[self.text][:, self.columns]


@contextlib.contextmanager
def first_outputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Notice in passing what each module returns within the block, the first time, detached.

    Calling a module once more instead would make ZeRO-3 fetch its weights again, and forget the
    order of modules by which it prefetches those of the next steps.
    """
    seen: dict[nn.Module, Tensor] = {}

    def notice(module: nn.Module, _: object, output: Tensor) -> None:
        seen.setdefault(module, output.detach())

    handles = [module.register_forward_hook(notice) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def key(measure: str, modality: str, teacher: int) -> str:
    """The name of a measure in the log: that of the first teacher has no number."""
    return f"{measure}/{modality}" + (f"_{teacher}" if teacher else "")


def likeness(
    student: Features,
    teachers: Sequence[Features],
    projected: Sequence[Sequence[Tensor]],
) -> dict[str, Tensor]:
    """Mean cosine and debiased linear CKA with each teacher, by modality.

    Args:
        student: its embeddings, which CKA compares; widths need not be equal.
        teachers: theirs.
        projected: the student's image and text embeddings in each teacher's space, for cosine.

    Returns:
        Detached scalars ``cosine/image``, ``cosine/text``, ``cka/image``, ``cka/text`` of this
        rank's batch; those of further teachers end in ``_1``, ``_2``, ... A cosine of unequal
        widths, and a CKA of less than ``MIN_ROWS`` pairs, is left out.
    """
    found = {}
    for number, (teacher, own) in enumerate(zip(teachers, projected, strict=True)):
        for modality, x, u in zip(MODALITIES, own, teacher[:2], strict=True):
            if x.shape == u.shape:
                found[key("cosine", modality, number)] = mean_cosine(x, u)
        for modality, x, u in zip(MODALITIES, student[:2], teacher[:2], strict=True):
            if len(x) >= MIN_ROWS:
                found[key("cka", modality, number)] = linear_cka(x, u)
    return found
