# SPDX-License-Identifier: Apache-2.0
"""How alike student and teacher became: what training logs of it, in words for people."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdengine.report.runs import Record

MEASURES = {"cosine": "Cosine", "cka": "CKA"}
MODALITIES = {"image": "images", "text": "texts"}
EXPLANATION = (
    "Of each rank's batch when last logged, mean over ranks. Cosine: mean over pairs, the "
    "student's embedding in the teacher's space. CKA: debiased linear, of the student's own."
)


@dataclass(frozen=True)
class Likeness:
    """One measure of one modality with one teacher.

    Attributes:
        key: its name in metrics.jsonl.
        measure: ``cosine`` or ``cka``.
        modality: ``image`` or ``text``.
        teacher: number of the teacher, from 0.
    """

    key: str
    measure: str
    modality: str
    teacher: int

    @property
    def label(self) -> str:
        """For the row of a table and the title of a chart."""
        teacher = f" {self.teacher + 1}" if self.teacher else ""
        return f"{MEASURES[self.measure]} with teacher{teacher}, {MODALITIES[self.modality]}"

    @property
    def unit(self) -> str:
        """For the axis of a chart."""
        return "mean cosine" if self.measure == "cosine" else "debiased linear CKA"


def collect(runs: Sequence[Record]) -> list[Likeness]:
    """Every likeness that a run logged: by teacher, cosine before CKA, images before texts."""
    names = {name for run in runs for record in run.steps for name in record}
    pattern = rf"({'|'.join(MEASURES)})/({'|'.join(MODALITIES)})(?:_([1-9]\d*))?"
    found = [
        Likeness(match[0], match[1], match[2], int(match[3] or 0))
        for name in names
        if (match := re.fullmatch(pattern, name)) and any(run.series(name)[0] for run in runs)
    ]
    places = [*MEASURES, *MODALITIES]

    def order(one: Likeness) -> tuple[int, int, int]:
        return one.teacher, places.index(one.measure), places.index(one.modality)

    return sorted(found, key=order)
