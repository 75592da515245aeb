# SPDX-License-Identifier: Apache-2.0
"""Split files: their format, halves, shots; and training on the samples that they list."""

import io
import json
import random
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdengine.data import DatasetIndex, ViewSpec, build_loader, ensure_index
from kdengine.data.split import (
    Listed,
    choose,
    few_shots,
    half,
    read_split,
    write_split,
)
from kdengine.data.subset import subset

VIEW = ViewSpec(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NAMES = ["cat", "dog", "polar bear"]
PER_CLASS = 6


def jpeg(shade: int) -> bytes:
    # brighter to the right, so that a mirrored image is another
    image = Image.linear_gradient("L").rotate(90).resize((24, 24)).point(lambda x: x * 3 // 5)
    out = io.BytesIO()
    image.point(lambda x: x + shade).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with three classes, whose order by name is another than that of the numbers."""
    for name in NAMES:
        for n in range(PER_CLASS):
            path = tmp_path / "set" / name / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(10 * n))
    return tmp_path / "set"


@pytest.fixture
def archives(tmp_path: Path) -> str:
    """The same as two shards with wrong numbers in ``.cls``: a split has its own."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for label in range(len(NAMES)):
                for n in range(shard, PER_CLASS, 2):
                    member(tar, f"{label}-{n}.jpg", jpeg(10 * n))
                    member(tar, f"{label}-{n}.cls", b"7")
    return f"{tmp_path}/{{0,1}}.tar"


def indexed(data: Any) -> DatasetIndex:
    return ensure_index(str(data), require="label", num_workers=0)


def written(path: Path, parts: dict[str, list]) -> str:
    path.write_text(json.dumps({"train": [], "val": [], "test": [], **parts}))
    return str(path)


def rows(name: str) -> list[list]:
    """Images 0 to 3 of each class, by paths or keys."""
    if name == "folder":
        return [[f"{c}/{n}.jpg", i, c] for i, c in enumerate(NAMES) for n in range(4)]
    return [[f"{i}-{n}", i, c] for i, c in enumerate(NAMES) for n in range(4)]


def test_the_first_half_of_the_classes_is_larger() -> None:
    assert [len(half(n, "base")) for n in (1, 2, 5, 10, 397)] == [1, 1, 3, 5, 199]
    for n in (1, 4, 7):
        assert [*half(n, "base"), *half(n, "novel")] == list(half(n, "all")) == list(range(n))


def test_shots_are_drawn_by_class_whatever_the_order_and_more_hold_fewer() -> None:
    items = [Listed(f"{label}/{n}.jpg", label) for label in range(4) for n in range(9 - label)]
    few, more = few_shots(items, 3, 5), few_shots(items, 8, 5)
    assert Counter(item.label for item in few) == dict.fromkeys(range(4), 3)
    assert Counter(item.label for item in more) == {0: 8, 1: 8, 2: 7, 3: 6}
    assert set(few) < set(more)
    shuffled = random.Random(0).sample(items, len(items))
    assert set(few_shots(shuffled, 3, 5)) == set(few)
    assert set(few_shots(items, 3, 6)) != set(few)
    assert few_shots(items, 0, 5) == items


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_split_names_samples_and_their_classes(
    kind: str, tree: Path, archives: str, tmp_path: Path
) -> None:
    index = indexed(tree if kind == "folder" else archives)
    path = written(tmp_path / "split.json", {"train": rows(kind)})
    split = read_split(path)
    assert split.classes == NAMES
    chosen = choose(index, split.parts["train"], path)
    assert not chosen.lacking and len(chosen.numbers) == 4 * len(NAMES)
    part = subset(index, chosen.numbers, chosen.labels, NAMES)
    assert part.num_samples == 12 and part.num_quarantined == 0
    assert part.keys() == [index.keys()[number] for number in chosen.numbers]
    for key, label in zip(part.keys(), part.labels().tolist(), strict=True):
        name = key.split("/")[0] if kind == "folder" else NAMES[int(key[0])]
        assert NAMES[label] == name
    # written once
    assert subset(index, chosen.numbers, chosen.labels, NAMES).shards == part.shards
    assert subset(index, chosen.numbers, 2 - chosen.labels, NAMES).shards != part.shards


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_training_reads_the_listed_samples_with_their_classes(
    kind: str, tree: Path, archives: str, tmp_path: Path
) -> None:
    index = indexed(tree if kind == "folder" else archives)
    items = read_split(written(tmp_path / "split.json", {"train": rows(kind)})).parts["train"]
    chosen = choose(index, items, "split.json")
    part = subset(index, chosen.numbers, chosen.labels, NAMES)

    def make(rank: int = 0, world_size: int = 1) -> Any:
        return build_loader(
            part,
            views={"image": VIEW},
            tokenizers={},
            batch_size=4 // world_size,
            rank=rank,
            world_size=world_size,
            num_threads=1,
            with_labels=True,
            seed=3,
        )

    loader = make()
    assert loader.steps_per_epoch == 3
    orders = []
    for _ in range(3):
        epoch = list(islice(loader, 3))
        numbers = torch.cat([batch["sample"] for batch in epoch]).tolist()
        assert sorted(numbers) == list(range(12))
        for batch in epoch:
            wanted = part.labels()[batch["sample"].numpy()]
            assert batch["label"].tolist() == wanted.tolist()
        orders.append(numbers)
    assert orders[0] != orders[1] and orders[1] != orders[2]
    # the ranks' parts are one whole in every pass
    both = [make(rank, 2) for rank in range(2)]
    for _ in range(2):
        seen = [n for r in both for b in islice(r, 3) for n in b["sample"].tolist()]
        assert sorted(seen) == list(range(12))
    # and a place in the data is found again
    again = make()
    again.load_state_dict(make_state(make(), 4))
    for one, other in zip(islice(again, 3), islice(skipped(make(), 4), 3), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def make_state(loader: Any, steps: int) -> dict[str, Any]:
    return skipped(loader, steps).state_dict()


def skipped(loader: Any, steps: int) -> Any:
    for _ in range(steps):
        next(loader)
    return loader


def test_half_of_the_images_are_mirrored_and_all_views_of_one_alike(tree: Path) -> None:
    part = indexed(tree)

    def batches(flip: bool) -> list[dict[str, torch.Tensor]]:
        loader = build_loader(
            part,
            views={"image": VIEW, "other": ViewSpec(16, (0.4, 0.4, 0.4), (0.5, 0.5, 0.5))},
            tokenizers={},
            batch_size=6,
            num_threads=1,
            flip=flip,
        )
        return list(islice(loader, 12))

    plain, mirrored = batches(False), batches(True)
    flipped = []
    for one, other in zip(plain, mirrored, strict=True):
        assert torch.equal(one["sample"], other["sample"])
        for n in range(6):
            same = torch.equal(one["image"][n], other["image"][n])
            back = torch.equal(one["image"][n], other["image"][n].flip(2))
            assert same != back
            assert torch.equal(one["other"][n], other["other"][n]) == same
            flipped.append(back)
    assert 20 <= sum(flipped) <= 52


def test_images_are_found_below_the_folder_that_a_list_starts_in(tmp_path: Path) -> None:
    for folder, ending in (("images", "jpg"), ("masks", "png")):
        for n in range(2):
            path = tmp_path / "pets" / folder / f"Sphynx_{n}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(n))
    index = indexed(tmp_path / "pets")
    items = [Listed("Sphynx_1.jpg", 0), Listed("Sphynx_9.jpg", 0)]
    chosen = choose(index, items, "split.json")
    assert [index.keys()[n] for n in chosen.numbers] == ["images/Sphynx_1.jpg"]
    assert chosen.lacking == ["Sphynx_9.jpg"]


def test_a_key_of_two_shards_tells_no_sample(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            member(tar, "a.jpg", jpeg(shard))
            member(tar, "a.cls", b"0")
    index = indexed(f"{tmp_path}/{{0,1}}.tar")
    with pytest.raises(ValueError, match="'a.jpg' is the key of 2 samples"):
        choose(index, [Listed("a.jpg", 0)], "split.json")


def test_a_split_of_other_data_is_refused(tree: Path) -> None:
    match = "none of its 1 images is among the 18 of the data, the first is 'x/y.jpg'"
    with pytest.raises(ValueError, match=match):
        choose(indexed(tree), [Listed("x/y.jpg", 0)], "split.json")


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"train": 3}, "expected the lists train, val, test; train is none"),
        ({"train": [["a", 0]]}, r"train: expected \[image, class number, class name\], got"),
        ({"train": [["a", "0", "x"]]}, "train: expected"),
        ({"train": [["a", True, "x"]]}, "train: expected"),
        ({"train": [["a", 0, "x"], ["b", 0, "y"]]}, "class 0 is called 'x' and 'y'"),
        ({"train": [["a", 1, "x"]]}, "class 0 has no image"),
        ({"val": [["a", 0, "x"]]}, "there is no image to train on"),
        ({"train": [["a", 0, "x"]], "test": [["a", 0, "x"]]}, "'a' is listed twice"),
    ],
)
def test_what_is_no_split_is_refused(tmp_path: Path, parts: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_split(written(tmp_path / "split.json", parts))


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_split(str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        read_split(str(tmp_path / "b.json"))


def test_a_split_can_be_drawn(tree: Path, tmp_path: Path) -> None:
    index = indexed(tree)
    number = np.array([NAMES.index(name) for name in index.classes or ()])
    labels = number[index.labels()]
    write_split(tmp_path / "a.json", index, NAMES, labels, seed=1)
    write_split(tmp_path / "b.json", index, NAMES, labels, seed=2)
    first, second = (read_split(str(tmp_path / name)) for name in ("a.json", "b.json"))
    assert first.classes == NAMES and first != second
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        items = first.parts[part]
        assert Counter(item.label for item in items) == dict.fromkeys(range(3), count)
        assert all(item.image.startswith(NAMES[item.label]) for item in items)
    assert not choose(index, [i for p in first.parts.values() for i in p], "a.json").lacking
