# SPDX-License-Identifier: Apache-2.0
"""What the index makes of every hostile sample and archive, and of good ones."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdengine.data.causes import ARCHIVE_CAUSES, SAMPLE_CAUSES
from kdengine.data.index import DatasetIndex, ensure_index

KEPT = "kept"
LONG_KEY = "\u957f\u540d\u5b57_" + "x" * 180

# every sample of hostile-000.tar: kept, or the cause of its quarantine
SAMPLES = {
    "009000000": KEPT,  # control
    "009000001": "image-decode",  # JPEG cut at half
    "009000002": "image-header",  # JPEG cut after 20 bytes
    "009000003": "image-decode",  # progressive JPEG cut
    "009000004": "image-decode",  # JPEG without its end mark
    "009000005": "image-empty",
    "009000006": "image-format",  # random bytes
    "009000007": "image-format",  # HTML
    "009000008": "image-format",  # SVG
    "009000009": KEPT,  # control
    "009000010": KEPT,  # damaged inside the scan: DALI decodes it, with a visible flaw
    "009000011": KEPT,  # garbage after the picture
    "009000012": "image-pixels",  # JPEG that claims 65500x65500
    "009000013": "image-header",  # JPEG that claims 0x0
    "009000014": KEPT,  # CMYK
    "009000015": KEPT,  # grayscale
    "009000016": KEPT,  # EXIF orientation, which nobody applies
    "009000017": KEPT,  # bogus ICC profile
    "009000018": KEPT,  # garbage EXIF
    "009000019": KEPT,  # control
    "009000020": "image-depth",  # 16-bit grayscale PNG
    "009000021": "image-depth",  # 16-bit RGB PNG
    "009000022": KEPT,  # RGBA PNG
    "009000023": KEPT,  # palette PNG with transparency
    "009000024": KEPT,  # gray and alpha PNG
    "009000025": KEPT,  # 1-bit PNG
    "009000026": KEPT,  # 1x1
    "009000027": KEPT,  # 1x4000
    "009000028": KEPT,  # 4000x2
    "009000029": KEPT,  # control
    "009000030": "image-pixels",  # PNG that claims 60000x60000
    "009000031": "image-pixels",  # 176 megapixels in a small file
    "009000032": KEPT,  # inflating text chunk, which DALI ignores
    "009000033": "image-decode",  # PNG with a flipped byte
    "009000034": "image-decode",  # PNG cut at half
    "009000035": "image-format",  # GIF named .jpg
    "009000036": "image-format",  # GIF
    "009000037": KEPT,  # animated WebP: its first frame
    "009000038": KEPT,  # WebP named .jpg
    "009000039": KEPT,  # BMP named .jpg
    "009000040": "image-format",  # TIFF named .jpg
    "009000041": "image-format",  # JPEG 2000 named .jpg
    "009000042": "image-format",  # AVIF named .jpg
    "009000043": KEPT,  # control
    "009000044": "caption-empty",
    "009000045": "caption-empty",  # white space
    "009000046": KEPT,  # 10 000 characters
    "009000047": KEPT,  # 10 000 characters without a blank
    "009000048": "caption-encoding",  # invalid UTF-8
    "009000049": "caption-encoding",  # Latin-1
    "009000050": "caption-encoding",  # UTF-16
    "009000051": KEPT,  # byte order mark, dropped
    "009000052": KEPT,  # control bytes, made blanks
    "009000053": KEPT,  # lines
    "009000054": KEPT,  # many scripts
    "009000055": KEPT,  # combining marks
    "009000056": KEPT,  # special-token strings are plain text
    "009000057": KEPT,  # HTML
    "009000058": KEPT,  # a file name
    "009000059": KEPT,  # no .txt, but a caption in the .json
    "009000060": "caption-missing",
    "009000061": KEPT,  # control
    "009000062": KEPT,  # no .json
    "009000063": KEPT,  # cut .json
    "009000064": KEPT,  # empty .json
    "009000065": KEPT,  # .json is a list
    "009000066": KEPT,  # .json without captions
    "009000067": KEPT,  # .json with wrong types
    "009000068": KEPT,  # .json nested 100 000 deep
    "009000069": KEPT,  # .json lies about key and size
    "009000070": "image-missing",
    "009000071": KEPT,  # two images: the .jpg
    "009000072": KEPT,  # unknown members
    "009000073": KEPT,  # control
    "009000074": KEPT,  # control
}

# every sample of hostile-layout-000.tar; README, ._009200000.jpg and somedir/ are no samples
LAYOUT = {
    "009200000": [KEPT],
    "somedir/009200001": [KEPT],
    "009200002": [KEPT],
    "009200003": [KEPT],
    "009200004": [KEPT],
    "photo.v2.final": [KEPT],
    "009200005": ["image-link"],
    "009200006": ["image-link"],
    "../009200007": [KEPT],
    LONG_KEY: [KEPT],
    "009200008": [KEPT],
    "009200009": [KEPT],
    "009200010": [KEPT, "duplicate-key"],
    "009200011": [KEPT],
    "009200012": [KEPT],
}

# every archive: its cause, and what becomes of the samples that can be seen in it
ARCHIVES: dict[str, tuple[str | None, dict[str, int]]] = {
    "hostile-000.tar": (None, dict(Counter(SAMPLES.values()))),
    "hostile-layout-000.tar": (None, {KEPT: 13, "image-link": 2, "duplicate-key": 1}),
    "hostile-truncated.tar": ("archive-truncated", {KEPT: 6, "image-truncated": 1}),
    "hostile-truncated-header.tar": ("archive-truncated", {KEPT: 6, "caption-missing": 1}),
    "hostile-noeof.tar": (None, {KEPT: 12}),
    "hostile-badheader.tar": ("archive-bad-header", {KEPT: 6}),
    "hostile-empty.tar": ("archive-empty", {}),
    "hostile-nomembers.tar": ("archive-no-members", {}),
    "hostile-gzip.tar": ("archive-compressed", {}),
    "hostile-notatar.tar": ("archive-not-tar", {}),
    "hostile-allbad.tar": ("archive-no-good-sample", {"image-format": 6}),
}
NUM_SAMPLES = sum(sum(fates.values()) for _, fates in ARCHIVES.values())


@pytest.fixture(scope="module")
def hostile(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return ensure_index(
        [str(test_data / name) for name in ARCHIVES],
        index_dir=str(tmp_path_factory.mktemp("hostile")),
        tokenizers=["simple:77"],
        num_workers=0,
    )


def quarantine(index: DatasetIndex) -> list[dict[str, Any]]:
    lines = [Path(path).read_text("utf-8").splitlines() for path in index.quarantine_paths]
    return [json.loads(line) for part in lines for line in part]


def fates(index: DatasetIndex, archive: str) -> list[tuple[str, str]]:
    """(key, kept or cause) of every sample of an archive."""
    kept = [
        (index.key(number), KEPT)
        for shard in index.shards
        if Path(shard.tar).name == archive
        for number in range(shard.first, shard.first + shard.num_samples)
    ]
    return kept + [
        (record["key"], record["cause"])
        for record in quarantine(index)
        if Path(record["shard"]).name == archive and record["key"] is not None
    ]


def test_tables_name_everything_that_is_documented(test_data: Path) -> None:
    document = (test_data / "hostile.md").read_text("utf-8")
    keys = set(re.findall(r"^\| (\d{9}) \|", document, re.MULTILINE))
    archives = set(re.findall(r"^\| (hostile-\S+\.tar) \|", document, re.MULTILINE))
    assert keys == set(SAMPLES)
    assert archives | {"hostile-000.tar"} == set(ARCHIVES)
    assert {path.name for path in test_data.glob("hostile*.tar")} == set(ARCHIVES)


@pytest.mark.parametrize("key", SAMPLES)
def test_hostile_sample(hostile: DatasetIndex, key: str) -> None:
    assert dict(fates(hostile, "hostile-000.tar"))[key] == SAMPLES[key]


@pytest.mark.parametrize(
    "key", LAYOUT, ids=lambda key: key[:12].encode("ascii", "replace").decode()
)
def test_hostile_layout(hostile: DatasetIndex, key: str) -> None:
    found = [fate for name, fate in fates(hostile, "hostile-layout-000.tar") if name == key]
    assert found == LAYOUT[key]


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archive(hostile: DatasetIndex, name: str) -> None:
    cause, expected = ARCHIVES[name]
    records = [record for record in quarantine(hostile) if Path(record["shard"]).name == name]
    assert [record["cause"] for record in records if record["key"] is None] == [cause] * bool(cause)
    assert Counter(fate for _, fate in fates(hostile, name)) == expected
    assert (name in {Path(shard.tar).name for shard in hostile.shards}) == (KEPT in expected)


def test_no_other_keys_are_found(hostile: DatasetIndex) -> None:
    assert {key for key, _ in fates(hostile, "hostile-000.tar")} == set(SAMPLES)
    assert {key for key, _ in fates(hostile, "hostile-layout-000.tar")} == set(LAYOUT)


def test_kept_and_quarantined_are_all(hostile: DatasetIndex) -> None:
    summary = hostile.summary()
    assert hostile.num_samples + hostile.num_quarantined == summary["samples"] == NUM_SAMPLES
    assert sum(summary["causes"].values()) == summary["quarantined"] == hostile.num_quarantined
    assert len([r for r in quarantine(hostile) if r["key"] is not None]) == hostile.num_quarantined
    assert summary["archives"] == Counter(cause for cause, _ in ARCHIVES.values() if cause)


def test_every_cause_is_documented_and_explained(hostile: DatasetIndex) -> None:
    records = quarantine(hostile)
    assert {r["cause"] for r in records if r["key"] is None} <= set(ARCHIVE_CAUSES)
    assert {r["cause"] for r in records if r["key"] is not None} <= set(SAMPLE_CAUSES)
    assert all(record["detail"].strip() for record in records)


def test_workers_find_the_same_as_one_process(
    hostile: DatasetIndex, test_data: Path, tmp_path: Path
) -> None:
    again = ensure_index(
        [str(test_data / name) for name in ARCHIVES], index_dir=str(tmp_path), num_workers=2
    )
    assert again.summary() == hostile.summary()
    assert quarantine(again) == quarantine(hostile)


def number_of(index: DatasetIndex, key: str) -> int:
    return next(n for n in range(index.num_samples) if index.key(n) == key)


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        pytest.param("009000051", "a blue square", id="byte-order-mark"),
        pytest.param("009000052", "a red  circle  [31m here", id="control-bytes"),
        pytest.param("009000053", "a red circle\r\non a\n\ngradient", id="lines"),
        pytest.param("009000059", "a black square on a smooth colour gradient", id="from-json"),
        pytest.param("009000063", "a yellow circle on a smooth colour gradient", id="cut-json"),
    ],
)
def test_stored_caption(hostile: DatasetIndex, key: str, caption: str) -> None:
    assert hostile.texts(np.array([number_of(hostile, key)]))[0][0] == caption


def test_second_image_of_a_sample_is_not_taken(hostile: DatasetIndex, test_data: Path) -> None:
    import tarfile

    number = number_of(hostile, "009000071")
    shard = next(shard for shard in hostile.shards if Path(shard.tar).name == "hostile-000.tar")
    line = Path(shard.idx).read_text().splitlines()[1 + number - shard.first]
    with tarfile.open(test_data / "hostile-000.tar") as tar:
        member = tar.getmember("009000071.jpg")
    assert line == f"img {member.offset_data} {member.size} {number - shard.first}"


def test_tokens_are_those_of_open_clip(hostile: DatasetIndex) -> None:
    import open_clip

    numbers = np.random.default_rng(0).permutation(hostile.num_samples)
    texts = [captions[0] for captions in hostile.texts(numbers)]
    expected = open_clip.get_tokenizer("ViT-B-32")(texts).numpy()
    found = hostile.captions("simple:77").tokens(numbers)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_several_captions_are_chosen_by_number(test_data: Path, tmp_path: Path) -> None:
    shard = str(test_data / "cocomini-by-000.tar")
    index = ensure_index(shard, index_dir=str(tmp_path), tokenizers=["simple:20"], num_workers=0)
    table = index.captions("simple:20")
    numbers = np.array([50, 0, 7])
    assert table.num_captions(numbers).tolist() == [5, 5, 5]
    texts = index.texts(numbers)
    choice = np.array([4, 0, 2])
    from kdengine.data.tokenize import load_tokenizer

    wanted = [captions[number] for captions, number in zip(texts, choice, strict=True)]
    expected = load_tokenizer("simple:20")(wanted).numpy()
    np.testing.assert_array_equal(table.tokens(numbers, choice), expected)
    with pytest.raises(IndexError, match="draw below num_captions"):
        table.tokens(numbers, np.array([0, 5, 0]))
    with pytest.raises(IndexError, match=r"lie in \[0, 51\)"):
        table.tokens(np.array([51]))


def test_label_sets_need_no_captions(test_data: Path, tmp_path: Path) -> None:
    shard = str(test_data / "cifar10-zeroshot.tar")
    index = ensure_index(shard, index_dir=str(tmp_path), require="label", num_workers=0)
    assert np.bincount(index.labels()).tolist() == [200] * 10
    assert index.summary()["captions"] == 0


def test_label_sets_have_no_sample_for_training(test_data: Path, tmp_path: Path) -> None:
    shard = str(test_data / "cifar10-zeroshot.tar")
    index = ensure_index(shard, index_dir=str(tmp_path), num_workers=0)
    assert index.shards == ()
    assert index.summary()["causes"] == {"caption-missing": 2000}
    assert len(index.labels()) == 0


def read_with_dali(index: DatasetIndex) -> list[tuple[str, str, bytes]]:
    """(archive, name field, image bytes) of one pass of DALI's own reader."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def read() -> Any:
        return fn.readers.webdataset(
            paths=[shard.tar for shard in index.shards],
            index_paths=[shard.idx for shard in index.shards],
            ext=["img"],
            missing_component_behavior="error",
        )

    pipeline = read()
    pipeline.build()
    found = []
    for _ in range(index.num_samples):
        (output,) = pipeline.run()
        archive, _, name = output[0].source_info().rsplit(":", 2)
        found.append((Path(archive).name, name, output.at(0).tobytes()))
    return found


def test_dali_reads_exactly_the_good_images(hostile: DatasetIndex) -> None:
    expected = []
    for shard in hostile.shards:
        data = Path(shard.tar).read_bytes()
        for line in Path(shard.idx).read_text().splitlines()[1:]:
            _, offset, size, name = line.split()
            expected.append(
                (Path(shard.tar).name, name, data[int(offset) : int(offset) + int(size)])
            )
    assert read_with_dali(hostile) == expected


def test_shard_listed_twice_is_read_twice(test_data: Path, tmp_path: Path) -> None:
    shard = str(test_data / "hostile-noeof.tar")
    index = ensure_index(f"{shard}::{shard}", index_dir=str(tmp_path), num_workers=0)
    assert [s.first for s in index.shards] == [0, 12]
    assert index.stats.num_shards == 1
    once = [str(number) for number in range(12)]
    assert [name for _, name, _ in read_with_dali(index)] == once + once


def test_shard_is_known_by_its_content(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "cocomini-by-000.tar"
    copies = [tmp_path / folder / "any.tar" for folder in ("a", "b")]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(source, copy)
    # another caption of the same length, at the same place
    whole = copies[1].read_bytes()
    caption = ensure_index(str(source), index_dir=str(tmp_path / "i")).texts(np.array([0]))[0][0]
    assert whole.count(caption.encode()) > 0
    copies[1].write_bytes(whole.replace(caption.encode(), caption.swapcase().encode()))
    index = ensure_index([str(source), *map(str, copies)], index_dir=str(tmp_path / "i"))
    same, also, other = (shard.content_digest() for shard in index.shards)
    assert same == also != other
    # an index that was written without it finds it out
    old = dataclasses.replace(index.shards[0], content=None)
    assert old.content_digest() == same


def test_part_of_one_shard_counts_from_zero(test_data: Path, tmp_path: Path) -> None:
    tars = [str(test_data / f"{name}-000.tar") for name in ("cocomini-by", "flickr8k-val")]
    index = ensure_index(tars, index_dir=str(tmp_path))
    shard = index.shards[1]
    part = index.only(shard)
    assert part.num_samples == shard.num_samples and part.shards[0].first == 0
    numbers = np.arange(7)
    assert part.texts(numbers) == index.texts(numbers + shard.first)
    counts = index.num_captions(np.arange(index.num_samples))
    starts = np.cumsum([0, *counts[shard.first :]])[:7]
    assert index.first_captions(numbers + shard.first).tolist() == starts.tolist()
