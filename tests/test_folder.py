# SPDX-License-Identifier: Apache-2.0
"""Folders with a folder of images for each class: index, quarantine, pixels."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdengine.data import ViewSpec, build_loader, ensure_index
from kdengine.data.folder import scan_folder
from kdengine.data.index import DatasetIndex
from kdengine.data.shards import expand

VIEW = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def encoded(kind: str = "JPEG", shade: int = 99, size: int = 40) -> bytes:
    image = Image.linear_gradient("L").resize((size, size + 8)).point(lambda x: (x + shade) % 256)
    out = io.BytesIO()
    image.convert("RGB").save(out, kind)
    return out.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def indexed(folder: Path | str, **options) -> DatasetIndex:
    return ensure_index(str(folder), require="label", num_workers=0, **options)


def load(index: DatasetIndex, **options) -> dict[int, torch.Tensor]:
    """Every image of an evaluation loader by its sample number."""
    options = {"batch_size": 4, "num_threads": 1, "train": False, **options}
    found: dict[int, torch.Tensor] = {}
    for batch in build_loader(index, views={"image": VIEW}, tokenizers={}, **options):
        valid = batch["valid"]
        for number, image in zip(
            batch["sample"][valid].tolist(), batch["image"][valid], strict=True
        ):
            assert number not in found
            found[number] = image.clone()
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Good images of two classes, in every spelling, at two depths."""
    folder = tmp_path / "set"
    put(folder / "10" / "b.JPEG", encoded(shade=1))
    put(folder / "10" / "a b:c;d.PNG", encoded("PNG", 2))
    put(folder / "10" / "deeper" / "b.webp", encoded("WEBP", 3))
    put(folder / "2" / "b.jpg", encoded(shade=4))
    put(folder / "2" / "line\nfeed \u00fc.JPG", encoded(shade=5))
    (tmp_path / "outside.jpg").write_bytes(encoded(shade=6))
    (folder / "2" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    return folder


KEYS = ["10/a b:c;d.PNG", "10/b.JPEG", "10/deeper/b.webp", "2/b.jpg", "2/line\nfeed \u00fc.JPG"]
KEYS += ["2/link.jpg"]


def test_images_are_numbered_by_name_and_labelled_by_folder(tree: Path) -> None:
    index = indexed(tree)
    assert index.classes == ("10", "2")
    assert [index.key(number) for number in range(index.num_samples)] == KEYS
    assert index.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert index.files() == [f"{tree}/{key}" for key in KEYS]
    assert index.num_quarantined == 0 and index.summary()["notes"] == {}


def test_a_folder_has_the_pixels_of_a_shard(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "same.tar", "w") as tar:
        for number, key in enumerate(KEYS):
            data = (tree / key).read_bytes()
            for name, content in ((f"{number}.jpg", data), (f"{number}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    from_shard, from_folder = load(indexed(tmp_path / "same.tar")), load(indexed(tree))
    assert from_shard.keys() == from_folder.keys() == set(range(6))
    assert all(torch.equal(from_shard[n], from_folder[n]) for n in range(6))
    assert len({image.sum().item() for image in from_folder.values()}) == 6


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_share_a_folder(tree: Path, world_size: int) -> None:
    index = indexed(tree)
    whole, parts = load(index), {}
    for rank in range(world_size):
        part = load(index, rank=rank, world_size=world_size)
        assert parts.keys().isdisjoint(part)
        parts |= part
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


HOSTILE = {
    "2/cut.jpg": ("image-decode", lambda: encoded(size=200)[:600]),
    "2/empty.png": ("image-empty", lambda: b""),
    "2/page.jpeg": ("image-format", lambda: b"<html>404</html>"),
    "2/gif.gif": ("image-format", lambda: encoded("GIF")),
    "2/deep.png": ("image-depth", lambda: sixteen_bits()),
    "2/huge.png": ("image-pixels", lambda: encoded("PNG", size=300)),
}


def sixteen_bits() -> bytes:
    out = io.BytesIO()
    Image.new("I;16", (8, 8), 999).save(out, "PNG")
    return out.getvalue()


def test_bad_files_are_quarantined_by_cause(tree: Path) -> None:
    causes = {}
    for name, (cause, make) in HOSTILE.items():
        put(tree / name, make())
        causes[name] = cause
    os.mkfifo(tree / "2" / "pipe.jpg")
    (tree / "2" / "broken.jpg").symlink_to("nowhere.jpg")
    nameless = os.fsdecode(b"2/\xff.jpg")
    put(tree / nameless, encoded())
    causes |= {"2/pipe.jpg": "image-link", "2/broken.jpg": "member-unreadable"}
    causes[nameless] = "file-name"
    for name in ("2/readme.txt", "2/._b.jpg", "loose.jpg", ".hidden/x.jpg"):
        put(tree / name, encoded())
    index = indexed(tree, max_pixels=300 * 300)
    assert [index.key(number) for number in range(index.num_samples)] == KEYS
    lines = Path(index.quarantine_paths[0]).read_text().splitlines()
    assert {r["key"]: r["cause"] for r in map(json.loads, lines)} == causes
    assert index.num_quarantined == len(causes)
    assert index.summary()["notes"] == {"ignored-members": 3}
    assert len(load(index)) == len(KEYS)


def test_workers_find_what_one_process_finds(tree: Path, tmp_path: Path) -> None:
    put(tree / "2" / "cut.jpg", encoded(size=200)[:600])
    one = indexed(tree)
    two = ensure_index(str(tree), require="label", num_workers=2, index_dir=str(tmp_path / "index"))
    assert one.files() == two.files() and one.num_quarantined == two.num_quarantined == 1


@pytest.mark.parametrize("change", ["add", "remove", "rewrite", "class", "rename"])
def test_a_changed_folder_is_indexed_anew(tree: Path, change: str) -> None:
    assert indexed(tree).stats.num_shards == 1
    assert indexed(tree).stats.num_shards == 0
    if change == "add":
        put(tree / "10" / "deeper" / "new.jpg", encoded())
    elif change == "remove":
        (tree / "10" / "b.JPEG").unlink()
    elif change == "rewrite":
        (tree / "10" / "b.JPEG").write_bytes(encoded(shade=1))
        os.utime(tree / "10" / "b.JPEG", (1, 1))
    elif change == "class":
        (tree / "30").mkdir()
    else:
        (tree / "2").rename(tree / "3")
    again = indexed(tree)
    assert again.stats.num_shards == 1
    assert again.files() == [f"{tree}/{file.key}" for file in scan_folder(str(tree)).files]
    assert again.classes == tuple(sorted(path.name for path in tree.iterdir()))


def test_the_index_lies_beside_the_folder_or_where_it_is_told_to(
    tree: Path, tmp_path: Path
) -> None:
    before = sorted(tree.rglob("*"))
    indexed(f"{tree}/", index_dir=str(tmp_path / "index"))
    assert not (tmp_path / ".kdengine").exists() and (tmp_path / "index").is_dir()
    index = indexed(f"{tree}/")
    assert Path(index.shards[0].folder) == tmp_path / ".kdengine" / "label" / "set"
    assert sorted(tree.rglob("*")) == before


def test_a_link_to_a_class_counts_and_a_circle_ends(tree: Path) -> None:
    shutil.copytree(tree / "2", tree.parent / "elsewhere")
    (tree / "linked").symlink_to(tree.parent / "elsewhere")
    (tree / "2" / "round").symlink_to(tree)
    index = indexed(tree)
    assert index.classes == ("10", "2", "linked")
    assert index.labels().tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("damage", ["overwritten", "removed"])
def test_a_file_changed_after_indexing_is_named(tree: Path, damage: str) -> None:
    index = indexed(tree)
    victim = tree / KEYS[4]
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(b"\x07" * 100)
    with pytest.raises(RuntimeError) as caught:
        load(index)
    message = str(caught.value)
    assert str(victim) in message and f"kdengine index {tree} --require label" in message
    assert ("sample 4 (key" in message) == (damage == "overwritten")


def test_class_folders_have_no_captions_to_train_on(tree: Path) -> None:
    with pytest.raises(ValueError, match="they have labels and no captions: evaluate them with"):
        ensure_index(str(tree))
    wanted = {"tokens": "simple:77"}
    with pytest.raises(ValueError, match=f"reads shards, and {tree} holds class folders, which"):
        build_loader(indexed(tree), views={"image": VIEW}, tokenizers=wanted, batch_size=2)


@pytest.mark.parametrize("require", ["label", "caption"])
def test_class_folders_stand_alone(tree: Path, tmp_path: Path, require: str) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(
        ValueError, match="one folder of class folders; got the folder .*/set among"
    ):
        ensure_index(f"{tmp_path}/*", require=require, num_workers=0)
    with pytest.raises(ValueError, match="among 2"):
        indexed(f"{tree}::{tmp_path}/a.tar")


def test_a_folder_with_shards_is_a_folder_of_shards(tree: Path) -> None:
    (tree / "a.tar").touch()
    assert expand(str(tree)) == [str(tree / "a.tar")]


def test_class_folders_without_a_good_image_are_told(tmp_path: Path) -> None:
    (tmp_path / "set" / "empty").mkdir(parents=True)
    index = indexed(tmp_path / "set")
    assert index.summary()["archives"] == {"archive-no-members": 1}
    with pytest.raises(ValueError, match=r"no good sample among 0 \(archive-no-members 1\)"):
        build_loader(index, views={"image": VIEW}, tokenizers={}, batch_size=2, train=False)
    put(tmp_path / "set" / "empty" / "a.jpg", b"no image")
    index = indexed(tmp_path / "set")
    assert index.summary()["causes"] == {"image-format": 1} and index.num_samples == 0
