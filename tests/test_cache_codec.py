# SPDX-License-Identifier: Apache-2.0
"""Stored embeddings: what comes back, how far off it is, and what the manifest tells apart."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdengine.cache import Manifest, check_teachers, codec
from kdengine.cache.manifest import TeacherEntry
from kdengine.models.source import resolve

# relative rounding error of a value in bf16; of int8 half a step of max/127 in each of E values
BOUNDS = {"fp32": 0.0, "bf16": 2**-8}


def rows(count: int = 33, width: int = 48) -> torch.Tensor:
    found = F.normalize(torch.randn(count, width), dim=1)
    found[0] = 0
    found[1] = F.one_hot(torch.tensor(3), width)
    return found


def round_trip(x: torch.Tensor, storage: str) -> torch.Tensor:
    stored = {name: torch.from_numpy(v) for name, v in codec.encode(x, storage).items()}
    assert set(stored) == set(codec.arrays(storage))
    return codec.decode(stored, storage, torch.float32)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_float_storage_is_off_by_its_rounding_alone(storage: str) -> None:
    x = rows()
    back = round_trip(x, storage)
    assert torch.equal(back, x if storage == "fp32" else x.bfloat16().float())
    assert ((back - x).abs() <= BOUNDS[storage] * x.abs()).all()


def test_int8_storage_is_off_by_half_a_step_of_its_row() -> None:
    x = rows()
    step = x.abs().amax(1, keepdim=True) / 127
    back = round_trip(x, "int8")
    assert ((back - x).abs() <= step / 2 * (1 + 1e-5)).all()
    # rows of one value and of none are exact
    assert torch.equal(back[0], x[0]) and torch.allclose(back[1], x[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", codec.STORAGES)
def test_error_that_is_told_is_the_distance_between_rows(storage: str) -> None:
    x = rows()
    told = codec.errors(x, codec.encode(x, storage), storage)
    torch.testing.assert_close(told, (round_trip(x, storage) - x).norm(dim=1))
    assert (told.max() > 0) == (storage != "fp32")


@pytest.mark.parametrize("storage, size", [("fp32", 4 * 48), ("bf16", 2 * 48), ("int8", 48 + 4)])
def test_bytes_of_a_row(storage: str, size: int) -> None:
    stored = codec.encode(rows(10), storage)
    assert sum(np.asarray(v).nbytes for v in stored.values()) == 10 * size


def entry(model: str = "ViT-B-32", tag: str | None = "openai", **changes) -> TeacherEntry:
    spec = dataclasses.replace(resolve("teacher", model).spec, pretrained=tag)
    return TeacherEntry(spec=spec, weights="0" * 64, scale=100.0, precision="fp32", **changes)


def manifest(*entries: TeacherEntry, **changes) -> Manifest:
    fields = {"views": 2, "storage": "bf16", "seed": 0}
    fields |= {"crop_area": (0.9, 1.0), "crop_aspect": (0.75, 4 / 3)}
    return Manifest(entries or (entry(),), **(fields | changes))


def test_manifest_comes_back_equal(tmp_path) -> None:
    first = manifest(entry(), entry("RN50", "cc12m"))
    first.write(tmp_path)
    again = Manifest.read(tmp_path)
    assert again.differences(first) == [] and again.digest == first.digest
    assert again.teachers[1].spec.embed_dim == 1024


@pytest.mark.parametrize(
    "other, told",
    [
        (manifest(views=3), "views is 2, not 3"),
        (manifest(storage="int8"), "storage is bf16, not int8"),
        (manifest(seed=1), "seed is 0, not 1"),
        (manifest(entry(), entry()), "it has 1 teachers, not 2"),
        (manifest(entry("ViT-L-14")), "the width of teacher ViT-B-32 is 512, not 768"),
        (manifest(entry("ViT-B-32-256")), "the size of teacher ViT-B-32 is 224, not 256"),
        (manifest(dataclasses.replace(entry(), weights="f" * 64)), "the weights of teacher"),
        (manifest(dataclasses.replace(entry(), precision="bf16")), "ran in fp32, not bf16"),
        (manifest(dataclasses.replace(entry(), scale=50.0)), "the scale of teacher"),
    ],
)
def test_difference_between_caches_is_named(other: Manifest, told: str) -> None:
    mine = manifest()
    assert any(told in line for line in mine.differences(other)), mine.differences(other)
    assert mine.digest != other.digest


def test_teachers_of_lists_are_compared_by_name_and_tag() -> None:
    check_teachers(manifest(), [])
    check_teachers(manifest(), [("ViT-B/32", "openai")])
    for named, told in (
        ([("ViT-B-32", "laion400m_e32")], "the run names ViT-B-32 / laion400m_e32"),
        ([("ViT-B-16", "openai")], "the run names ViT-B-16 / openai"),
        ([("ViT-B-32", "openai")] * 2, "the run names 2 teachers and the cache holds 1"),
    ):
        with pytest.raises(ValueError, match="cache: .*" + told.replace("/", ".")):
            check_teachers(manifest(), named)


@pytest.mark.parametrize(
    "name", ["hf-hub:org/name", "local-dir:/absent/teacher/export", "configs/tower.json"]
)
def test_teacher_that_is_not_at_hand_is_known_by_its_name(name: str) -> None:
    spec = dataclasses.replace(entry(tag=None).spec, name=name)
    held = manifest(dataclasses.replace(entry(), spec=spec))
    check_teachers(held, [(name, None)])
    with pytest.raises(ValueError, match="it is of another teacher"):
        check_teachers(held, [(name + "x", None)])


def test_precision_that_was_asked_for_is_that_of_the_cache() -> None:
    check_teachers(manifest(), [], "fp32")
    with pytest.raises(ValueError, match="ran in fp32, and the run asks for bf16"):
        check_teachers(manifest(), [], "bf16")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"format": 99}, "it is of format 99"),
        ({"views": None, "colour": 1}, "colour"),
        ({"teachers": [{}]}, "cannot be used"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path, change: dict, told: str) -> None:
    manifest().write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="make the cache anew") as caught:
        Manifest.read(tmp_path)
    assert told in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is not a cache"):
        Manifest.read(tmp_path / "absent")
