# SPDX-License-Identifier: Apache-2.0
"""Live teachers: which parts of a batch each reads, and what a run says of them."""

import dataclasses

import pytest
import torch
from torch import nn

from kdengine.data import ViewSpec
from kdengine.models import Features, PreprocessSpec, Teacher, TowerSpec
from kdengine.teachers import LiveTeachers, checksum

STUDENT = TowerSpec(
    name="student",
    model_cfg={},
    preprocess=PreprocessSpec(size=8),
    tokenizer="simple:77",
    context_length=77,
    embed_dim=4,
)


class Tower(nn.Module):
    """Says what it was given, times its weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1.0]))
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> Features:
        return Features(self.weight * image, self.weight * tokens, self.log_scale.exp())


def teacher(weight: float, size: int = 8, context: int = 77, **changes: object) -> Teacher:
    spec = dataclasses.replace(
        STUDENT,
        name=f"teacher-{weight:g}",
        preprocess=PreprocessSpec(size=size, **changes),  # type: ignore[arg-type]
        tokenizer=f"simple:{context}",
    )
    return Teacher(Tower(weight), spec)  # type: ignore[arg-type]


def several() -> LiveTeachers:
    half = (0.5, 0.5, 0.5)
    return LiveTeachers(
        [
            teacher(2.0),
            teacher(3.0, size=16, context=32),
            teacher(5.0, size=16, context=16),
            teacher(7.0, size=16, mean=half, std=half),
            teacher(9.0, context=16),
        ],
        STUDENT,
    )


def test_views_and_tokenizers_are_named_once_and_shared() -> None:
    teachers = several()
    spec = PreprocessSpec()
    half = (0.5, 0.5, 0.5)
    assert teachers.views() == {
        "teacher_image": ViewSpec(16, spec.mean, spec.std),
        "teacher_image_1": ViewSpec(16, half, half),
    }
    assert teachers.tokenizers() == {"teacher_tokens": "simple:32", "teacher_tokens_1": "simple:16"}
    alike = LiveTeachers([teacher(2.0), teacher(3.0)], STUDENT)
    assert alike.views() == {} and alike.tokenizers() == {}


def test_each_teacher_reads_its_own_part_of_a_batch() -> None:
    names = ("image", "teacher_image", "teacher_image_1")
    names += ("tokens", "teacher_tokens", "teacher_tokens_1")
    batch = {name: torch.full((1, 1), 10.0 + i) for i, name in enumerate(names)}
    found = [(x.image.item(), x.text.item()) for x in several()(batch)]
    assert found == [(20, 26), (33, 42), (55, 75), (84, 91), (90, 135)]
    assert not any(x.requires_grad or x.is_inference() for f in several()(batch) for x in f)


def test_the_checksum_knows_weights_and_order() -> None:
    one, other = teacher(2.0), teacher(3.0)
    # a run of a single teacher may go on that was begun when there was no more than one
    assert LiveTeachers([one], STUDENT).checksum() == checksum(one.tower)
    sums = [LiveTeachers(pair, STUDENT).checksum() for pair in ([one, other], [other, one])]
    assert sums[0] != sums[1] and LiveTeachers([one, other], STUDENT).checksum() == sums[0]
    with torch.no_grad():
        other.tower.weight.mul_(-1)
    assert LiveTeachers([one, other], STUDENT).checksum() != sums[0]


def test_the_header_has_a_line_a_teacher() -> None:
    alone = LiveTeachers([teacher(2.0)], STUDENT).rows()
    size = "0.0 M parameters, 0.0 M without token embedding"
    assert alone == {"teacher": f"teacher-2: {size}, 8 px, width 4, frozen"}
    rows = several().rows()
    assert list(rows) == [f"teacher {i}" for i in range(1, 6)]
    assert rows["teacher 2"].startswith("teacher-3: ") and "16 px" in rows["teacher 2"]
    assert [spec.name for spec in several().specs][:2] == ["teacher-2", "teacher-3"]


def test_a_batch_without_a_wanted_view_is_no_silent_fallback() -> None:
    with pytest.raises(KeyError, match="teacher_image"):
        several()({"image": torch.ones(1, 1), "tokens": torch.ones(1, 1)})
