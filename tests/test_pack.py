# SPDX-License-Identifier: Apache-2.0
"""From a table of image paths and captions to shards."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdengine.data.index import ensure_index
from kdengine.data.packing import PackReport, pack


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images of several formats, and files that are none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, format in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.jpg", "WEBP"), ("d.jpg", "GIF")):
        Image.new("RGB", (30, 20), 99).save(folder / name, format)
    (folder / "empty.jpg").touch()
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    table = folder / "table.csv"
    table.write_bytes(text.encode() if isinstance(text, str) else text)
    return table


def members(shard: str) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def rejected(report: PackReport) -> list[tuple[int, str]]:
    lines = Path(report.rejected_path).read_text().splitlines()
    return [(record["row"], record["cause"]) for record in map(json.loads, lines)]


def test_shards_have_the_layout_of_img2dataset(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\ta cat\nimages/b.png\ttwo dogs\n")
    report = pack(table, images / "out")
    found = members(report.shards[0])
    assert Path(report.shards[0]).name == "00000.tar"
    assert list(found) == [
        "000000000.jpg", "000000000.txt", "000000000.json",
        "000000001.png", "000000001.txt", "000000001.json",
    ]  # fmt: skip
    assert found["000000000.txt"] == b"a cat"
    record = json.loads(found["000000000.json"])
    assert (record["key"], record["caption"], record["captions"], record["status"]) == (
        "000000000", "a cat", ["a cat"], "success")  # fmt: skip
    assert (record["width"], record["height"]) == (30, 20)


def test_image_bytes_are_not_touched(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/c.jpg\ta\n")
    found = members(pack(table, images / "out").shards[0])
    assert found["000000000.webp"] == (images / "images" / "c.jpg").read_bytes()


def test_rows_of_one_image_become_its_captions(images: Path) -> None:
    table = write(
        images, "filepath\ttitle\nimages/a.jpg\tone\nimages/b.png\tx\nimages/a.jpg\ttwo\n"
    )
    report = pack(table, images / "out")
    assert (report.num_rows, report.num_samples, report.num_captions) == (3, 2, 3)
    assert json.loads(members(report.shards[0])["000000000.json"])["captions"] == ["one", "two"]


def test_every_row_is_packed_or_rejected_with_its_cause(images: Path) -> None:
    rows = [
        b"images/a.jpg\tgood", b"images/a.jpg\t ", b"images/none.jpg\tx", b"images/d.jpg\tgif",
        b"images/empty.jpg\tx", b"images/b.png\tcaf\xe9", b"\tx", b"images/c.jpg",
    ]  # fmt: skip
    report = pack(write(images, b"filepath\ttitle\n" + b"\n".join(rows)), images / "out")
    assert rejected(report) == [
        (2, "caption-empty"), (3, "image-missing"), (4, "image-format"), (5, "image-empty"),
        (6, "caption-encoding"), (7, "image-missing"), (8, "row-fields"),
    ]  # fmt: skip
    assert report.num_captions + sum(report.causes.values()) == report.num_rows == 8
    assert "rejected 7 of 8 rows" in str(report)


def test_pixel_limit_holds(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\ta\n")
    assert rejected(pack(table, images / "out", max_pixels=599)) == [(1, "image-pixels")]


def test_shards_are_filled_one_after_the_other(images: Path) -> None:
    rows = "".join(f"images/{name}\tx\n" for name in ("a.jpg", "none.jpg", "b.png", "c.jpg"))
    report = pack(write(images, "filepath\ttitle\n" + rows), images / "out", shard_size=2)
    assert [Path(shard).name for shard in report.shards] == ["00000.tar", "00001.tar"]
    assert list(members(report.shards[1]))[0] == "000010000.webp"
    stats = [json.loads((images / "out" / f"0000{n}_stats.json").read_text()) for n in (0, 1)]
    assert stats == [{"count": 3, "successes": 2}, {"count": 1, "successes": 1}]


def test_comma_is_found_out_and_columns_can_be_named(images: Path) -> None:
    table = write(images, 'id,text,file\n1,"a cat, sleeping",images/a.jpg\n')
    report = pack(table, images / "out", image_key="file", caption_key="text")
    assert members(report.shards[0])["000000000.txt"] == b"a cat, sleeping"


def test_missing_column_is_named_with_those_there(images: Path) -> None:
    table = write(images, "file\tcaption\nimages/a.jpg\tx\n")
    with pytest.raises(ValueError, match="no column 'filepath'.*'file', 'caption'.*--image-key"):
        pack(table, images / "out")
    assert not (images / "out").exists()


def test_folder_with_shards_is_refused(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\tx\n")
    pack(table, images / "out")
    with pytest.raises(FileExistsError, match="holds .tar files already"):
        pack(table, images / "out")


def test_equal_tables_give_equal_shards(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\tx\n")
    first, second = (pack(table, images / name).shards[0] for name in ("out", "again"))
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_packed_shards_index_without_a_loss(images: Path) -> None:
    for number in range(5):
        Image.new("RGB", (30 + number, 20), 99).save(images / "images" / f"{number}.jpg")
    rows = "".join(f"images/{number}.jpg\tcaption {number}\n" for number in range(5))
    report = pack(write(images, "filepath\ttitle\n" + rows), images / "out", shard_size=2)
    index = ensure_index(report.shards, num_workers=0)
    assert (index.num_samples, index.num_quarantined) == (5, 0)
    assert index.texts(np.arange(5)) == [[f"caption {number}"] for number in range(5)]


def test_table_with_a_byte_order_mark_and_windows_lines(images: Path) -> None:
    table = write(images, b"\xef\xbb\xbffilepath\ttitle\r\nimages/a.jpg\ta cat\r\n")
    assert members(pack(table, images / "out").shards[0])["000000000.txt"] == b"a cat"


def test_progress_bar_shows_the_images(images: Path, capsys: pytest.CaptureFixture) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\tx\nimages/b.png\tx\n")
    pack(table, images / "out", progress=True)
    assert "2 images" in capsys.readouterr().err


def test_rows_with_other_fields_than_the_header_are_named_by_line(images: Path) -> None:
    rows = [
        "images/a.jpg,fine",
        '"images/b.png","two\nlines"',
        "images/a.jpg,a cat, asleep",
        "x.jpg",
    ]
    report = pack(write(images, "filepath,title\n" + "\n".join(rows)), images / "out")
    records = [json.loads(line) for line in Path(report.rejected_path).read_text().splitlines()]
    assert [(r["row"], r["line"], r["cause"]) for r in records] == [
        (3, 5, "row-fields"), (4, 6, "row-fields"),
    ]  # fmt: skip
    assert records[0]["detail"] == "3 fields, the header has 2"
    assert "row-fields 2" in str(report) and "is at line 5" in str(report)
    assert report.num_captions == 2


def test_report_counts_one_thing_in_the_singular(images: Path) -> None:
    report = pack(write(images, "filepath\ttitle\nimages/a.jpg\ta\n"), images / "out")
    said = "packed 1 image with 1 caption into 1 shard; rejected 0 of 1 row"
    assert str(report) == said


@pytest.mark.parametrize(
    "rows",
    [
        'images/a.jpg,fine\nimages/b.png,"a cat\nimages/c.jpg,a dog\n',
        'images/a.jpg,"two\nlines"\nimages/b.png,"a cat\nimages/c.jpg,"a dog"\n',
    ],
    ids=["to-the-end", "to-the-next"],
)
def test_quote_that_is_not_closed_swallows_no_row(images: Path, rows: str) -> None:
    line = 3 if "fine" in rows else 4
    with pytest.raises(ValueError, match=f"^pack: .*starts at line {line} a quote opens"):
        pack(write(images, "filepath,title\n" + rows), images / "out")
    assert not (images / "out").exists()


def test_rejected_rows_say_why_in_plain_words(images: Path) -> None:
    rows = [b"images/b.png\tcaf\xe9", b"\tx", b"https://example.com/a.jpg\tx"]
    report = pack(write(images, b"filepath\ttitle\n" + b"\n".join(rows)), images / "out")
    records = map(json.loads, Path(report.rejected_path).read_text().splitlines())
    assert [record["detail"] for record in records] == [
        "character 4 is not UTF-8",
        "the row names no file",
        "https://example.com/a.jpg is a URL; download the file first",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"filepath\ttitle\n", "a header and no rows"),
        (b"PK\x03\x04\x00\x00 workbook", "not a text table in UTF-8"),
        ("filepath,title\na,b\n".encode("utf-16"), "not a text table in UTF-8"),
        (b"\xff\xd8\xff\xe0 photo\n", "not a text table in UTF-8"),
        (b"filepath,title,title\na.jpg,b,c\n", "two columns 'title'.*--caption-key"),
    ],
    ids=["empty", "blank", "header", "workbook", "utf-16", "photo", "two-columns"],
)
def test_what_is_no_table_is_refused_in_words(images: Path, text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^pack: .*{message}") as caught:
        pack(write(images, text), images / "out")
    assert str(caught.value).isprintable()
    assert not (images / "out").exists()


@pytest.mark.parametrize(("name", "what"), [("none.csv", "does not exist"), ("images", "a folder")])
def test_missing_table_is_refused_in_words(images: Path, name: str, what: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^pack: .*{name} .*{what}"):
        pack(images / name, images / "out")


def test_file_in_place_of_the_folder_is_refused(images: Path) -> None:
    table = write(images, "filepath\ttitle\nimages/a.jpg\tx\n")
    with pytest.raises(FileExistsError, match="^pack: .*is a file"):
        pack(table, table)
