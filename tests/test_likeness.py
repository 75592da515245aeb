# SPDX-License-Identifier: Apache-2.0
"""What the root module tells of the likeness of student and teachers, and when."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdengine import reference
from kdengine.methods import Clip, ClipKD, Distillation, Method
from kdengine.methods.likeness import first_outputs, likeness
from kdengine.models import Features

NAMES = ["cosine/image", "cosine/text", "cka/image", "cka/text"]


class Tower(nn.Module):
    """Linear towers; with a mask, images lose the first of their features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8, dtype=torch.float64))
        self.scale = torch.tensor([12.0], dtype=torch.float64)

    def forward(self, image: Tensor, tokens: Tensor, mask_ratio: float = 0.0) -> Features:
        return Features(self.encode_image(image, mask_ratio), tokens @ self.weight, self.scale)

    def encode_image(self, image: Tensor, mask_ratio: float = 0.0) -> Tensor:
        return image @ self.weight * torch.where(torch.arange(8) < 8 * mask_ratio, 0.0, 1.0)


def root_of(method: Method) -> Distillation:
    """The module, without the open_clip tower that a mask would be installed in."""
    ratio, method.mask_ratio = method.mask_ratio, 0.0
    root = Distillation(Tower(), method.double())  # type: ignore[arg-type]
    method.mask_ratio = ratio
    return root


def features(width: int, num: int = 9) -> Features:
    image, text = torch.randn(2, num, width, dtype=torch.float64)
    return Features(image, text, torch.tensor([20.0], dtype=torch.float64))


def cka(x: Tensor, y: Tensor) -> float:
    return reference.linear_cka(F.normalize(x, dim=1), F.normalize(y, dim=1)).item()


def values(logged: dict[str, Tensor], names: Sequence[str]) -> list[float]:
    return [logged[name].item() for name in names]


@pytest.mark.parametrize("width", [8, 5], ids=["equal", "unequal"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_cosine_is_in_the_teachers_space_and_cka_in_the_students(
    width: int, mask_ratio: float
) -> None:
    method = ClipKD(8, [width], mask_ratio=mask_ratio)
    root, pair, teacher = root_of(method), features(8), features(width)
    plain, without = root(pair.image, pair.text, [teacher])
    loss, logged = root(pair.image, pair.text, [teacher], diagnose=True)
    # of the whole image, whatever FD sees
    heads = method.image_head, method.text_head
    both = list(zip(heads, pair[:2], teacher[:2], strict=True))
    expected = [reference.mean_cosine(head(x), u).item() for head, x, u in both]
    expected += [cka(x, u) for _, x, u in both]
    assert values(logged, NAMES) == pytest.approx(expected, rel=1e-10)
    assert len({round(value, 6) for value in expected}) == 4
    assert torch.equal(loss, plain)
    assert logged.keys() - without.keys() == set(NAMES)
    assert not any(value.requires_grad for value in logged.values())
    assert not any(module._forward_hooks for module in root.modules())


def test_a_method_without_heads_compares_the_students_own_embedding_where_it_fits() -> None:
    pair, weights = features(8), {"fd": 0.0, "icl": 0.0}
    for width, names in ((8, NAMES), (5, NAMES[2:])):
        teacher = features(width)
        root = root_of(ClipKD(8, [width], **weights))
        _, logged = root(pair.image, pair.text, [teacher], diagnose=True)
        assert [name for name in logged if "/" in name] == names
        both = list(zip(pair[:2], teacher[:2], strict=True))
        expected = [reference.mean_cosine(x, u).item() for x, u in both if width == 8]
        expected += [cka(x, u) for x, u in both]
        assert values(logged, names) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("widths", "how"),
    [([5, 6], "concat"), ([3, 5], "concat"), ([5, 5], "mean"), ([8, 8], "mean")],
    ids=["columns of the head", "columns of its own", "one head", "none"],
)
def test_each_of_several_teachers_is_compared_where_it_is_learned_from(
    widths: list[int], how: str
) -> None:
    method = ClipKD(8, widths, teacher_features=how)
    root, pair, teachers = root_of(method), features(8), [features(width) for width in widths]
    _, logged = root(pair.image, pair.text, teachers, diagnose=True)
    for modality, head in enumerate((method.image_head, method.text_head)):
        whole = head(pair[modality])
        parts = whole.split(widths, 1) if how == "concat" else [whole, whole]
        for number, (part, teacher) in enumerate(zip(parts, teachers, strict=True)):
            name = ("image", "text")[modality] + ("_1" if number else "")
            expected = reference.mean_cosine(part, teacher[modality]).item()
            assert logged[f"cosine/{name}"].item() == pytest.approx(expected, rel=1e-10)
            expected = cka(pair[modality], teacher[modality])
            assert logged[f"cka/{name}"].item() == pytest.approx(expected, rel=1e-10)


def test_further_teachers_have_numbers() -> None:
    student, teachers = features(8), [features(8), features(5), features(8)]
    own = [student[:2], student[:2], student[:2]]
    found = likeness(student, teachers, own)
    cosines = [f"cosine/{m}{n}" for n in ("", "_2") for m in ("image", "text")]
    ckas = [f"cka/{m}{n}" for n in ("", "_1", "_2") for m in ("image", "text")]
    assert set(found) == {*cosines, *ckas}
    fitting = [teachers[0], teachers[2]]
    expected = [reference.mean_cosine(student[i], t[i]).item() for t in fitting for i in (0, 1)]
    assert values(found, cosines) == pytest.approx(expected, rel=1e-10)
    expected = [cka(student[i], teacher[i]) for teacher in teachers for i in (0, 1)]
    assert values(found, ckas) == pytest.approx(expected, rel=1e-10)


def test_a_batch_too_small_for_cka_has_none() -> None:
    student, teacher = features(8, num=3), features(8, num=3)
    assert list(likeness(student, [teacher], [student[:2]])) == NAMES[:2]
    assert math.isnan(cka(student.image, teacher.image))


def test_without_a_teacher_nothing_is_told() -> None:
    pair = features(8)
    _, logged = root_of(Clip())(pair.image, pair.text, (), diagnose=True)
    assert logged.keys() == {"task", "scale"}


def test_what_is_noticed_is_the_first_output_and_hooks_go_also_after_an_error() -> None:
    double, other = nn.Linear(2, 2), nn.Identity()
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    watching = first_outputs([double, other])
    with pytest.raises(ZeroDivisionError), watching as seen:
        expected = double(first).detach()
        double(second)
        assert double._forward_hooks and other._forward_hooks
        1 / 0  # noqa: B018
    assert seen.keys() == {double}
    assert torch.equal(seen[double], expected) and not seen[double].requires_grad
    assert not double._forward_hooks and not other._forward_hooks
