# SPDX-License-Identifier: Apache-2.0
"""The parts of validation: image headers, captions, archives, and the search for bad images."""

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from kdengine.data.archive import Archive, scan_archive
from kdengine.data.captions import clean_caption, json_captions, parse_label, sample_captions
from kdengine.data.causes import Fault
from kdengine.data.decode import find_failures
from kdengine.data.imageheader import ImageHeader, check_header


def encode(format: str, size: tuple[int, int] = (37, 23), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 99).save(buffer, format, **options)
    return buffer.getvalue()


def cause(found: object) -> str:
    return found.cause if isinstance(found, Fault) else f"not a fault: {found}"


@pytest.mark.parametrize(
    ("image", "format"),
    [
        pytest.param(encode("JPEG"), "jpeg", id="jpeg"),
        pytest.param(encode("JPEG", progressive=True), "jpeg", id="progressive"),
        pytest.param(encode("JPEG", exif=b"Exif\0\0" + bytes(60_000)), "jpeg", id="long-exif"),
        pytest.param(b"\xff\xd8" + b"\xff" * 5 + encode("JPEG")[3:], "jpeg", id="fill-bytes"),
        pytest.param(encode("PNG"), "png", id="png"),
        pytest.param(encode("PNG", mode="P"), "png", id="palette"),
        pytest.param(encode("PNG", mode="1"), "png", id="1-bit"),
        pytest.param(encode("WEBP"), "webp", id="lossy-webp"),
        pytest.param(encode("WEBP", lossless=True), "webp", id="lossless-webp"),
        pytest.param(encode("WEBP", mode="RGBA", exif=b"Exif\0\0"), "webp", id="extended-webp"),
        pytest.param(encode("BMP"), "bmp", id="bmp"),
    ],
)  # fmt: skip
def test_header_states_format_and_size(image: bytes, format: str) -> None:
    header = check_header(image, 1000)
    assert isinstance(header, ImageHeader)
    assert header[:3] == (format, 37, 23)
    assert header.bits <= 8


def test_bitmap_stored_from_the_top_has_a_positive_height() -> None:
    image = bytearray(encode("BMP"))
    struct.pack_into("<i", image, 22, -23)
    assert check_header(bytes(image), 1000) == ImageHeader("bmp", 37, 23, 8)


def test_pixel_limit_is_inclusive() -> None:
    assert isinstance(check_header(encode("PNG"), 37 * 23), ImageHeader)
    assert cause(check_header(encode("PNG"), 37 * 23 - 1)) == "image-pixels"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_header_cut_anywhere_never_raises(format: str) -> None:
    image = encode(format)
    for length in range(min(len(image), 700)):
        found = check_header(image[:length], 1000)
        assert isinstance(found, ImageHeader) or found.cause in (
            "image-empty", "image-format", "image-header")  # fmt: skip


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(b"", "image-empty", id="empty"),
        pytest.param(encode("GIF"), "image-format", id="gif"),
        pytest.param(encode("TIFF"), "image-format", id="tiff"),
        pytest.param(b"<html>not found</html>", "image-format", id="html"),
        pytest.param(encode("PNG", mode="I;16"), "image-depth", id="16-bit-png"),
        pytest.param(b"\xff\xd8\xff\xc0\0\x11\x0c\0\x10\0\x10\x03" + bytes(9), "image-depth",
                     id="12-bit-jpeg"),
        pytest.param(b"\xff\xd8\xff\xda\0\x0c", "image-header", id="jpeg-without-frame"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIDAT" + bytes(13), "image-header", id="no-ihdr"),
    ],
)  # fmt: skip
def test_unusable_header_has_a_cause(image: bytes, expected: str) -> None:
    assert cause(check_header(image, 1000)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("  a cat\n", "a cat", id="outer-white-space"),
        pytest.param("\ufeffa cat", "a cat", id="byte-order-mark"),
        pytest.param("a\x00b\x1bc\x7fd\x85e", "a b c d e", id="control-characters"),
        pytest.param("a\r\nb\tc", "a\r\nb\tc", id="inner-lines-stay"),
        pytest.param("\u202b\u0627\u202c", "\u202b\u0627\u202c", id="direction-marks-stay"),
    ],
)
def test_caption_is_cleaned(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(" \t\n\u00a0", "caption-empty", id="white-space"),
        pytest.param("\u200b\u200e\ufeff", "caption-empty", id="zero-width"),
        pytest.param("\x00\x07", "caption-empty", id="only-controls"),
        pytest.param("\ud800", "caption-encoding", id="lone-surrogate"),
        pytest.param("x" * 65_537, "caption-long", id="long"),
    ],
)
def test_unusable_caption_has_a_cause(text: str, expected: str) -> None:
    assert cause(clean_caption(text)) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(b'{"caption": "a", "captions": ["b", "c"]}', ["b", "c"], id="list-wins"),
        pytest.param(b'{"caption": "a", "captions": "b"}', ["a"], id="list-is-a-string"),
        pytest.param(b'{"caption": "a", "captions": [1, null, " "]}', ["a"], id="list-is-useless"),
        pytest.param(b'{"captions": ["a", 1, "b"]}', ["a", "b"], id="useless-items-go"),
        pytest.param(b'\xef\xbb\xbf{"caption": "a"}', ["a"], id="byte-order-mark"),
        pytest.param(b'{"caption": null, "captions": []}', [], id="nothing"),
        pytest.param(b'["a"]', [], id="no-object"),
        pytest.param(b'{"caption": "a', [], id="cut"),
        pytest.param(b"\xff", [], id="no-utf-8"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, [], id="nested"),
        pytest.param(b'{"width": ' + b"9" * 5000 + b', "caption": "a"}', [], id="huge-number"),
    ],
)
def test_json_gives_only_usable_captions(record: bytes, expected: list[str]) -> None:
    assert json_captions(record) == expected


@pytest.mark.parametrize(
    ("txt", "record", "expected"),
    [
        pytest.param(b"a", b'{"captions": ["b", "a", "b"]}', ["a", "b"], id="equal-ones-merge"),
        pytest.param(b"a", b"{", ["a"], id="broken-json-is-no-fault"),
        pytest.param(None, b'{"caption": "b"}', ["b"], id="json-speaks-without-txt"),
        pytest.param(b" ", b'{"caption": "b"}', "caption-empty", id="txt-decides"),
        pytest.param(b"\xe9", b'{"caption": "b"}', "caption-encoding", id="latin-1"),
        pytest.param(b"\xe2\x82\xac" * 30_000, None, "caption-long", id="long"),
        pytest.param(None, b"{}", "caption-missing", id="neither"),
        pytest.param(None, None, "caption-missing", id="no-members"),
    ],
)
def test_captions_of_a_sample(
    txt: bytes | None, record: bytes | None, expected: list[str] | str
) -> None:
    found = sample_captions(txt, record)
    assert (found.cause if isinstance(found, Fault) else found) == expected


@pytest.mark.parametrize(("data", "expected"), [(b"0", 0), (b" 17\n", 17)])
def test_label_is_a_number(data: bytes, expected: int) -> None:
    assert parse_label(data) == expected


@pytest.mark.parametrize("data", [b"", b"-1", b"1_0", b"cat", "\u0661".encode(), b"9" * 40])
def test_other_label_is_a_fault(data: bytes) -> None:
    assert cause(parse_label(data)) == "label-invalid"


def scan(tmp_path: Path, names: Sequence[str], **options) -> Archive:
    with tarfile.open(tmp_path / "s.tar", "w", **options) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return scan_archive(str(tmp_path / "s.tar"))


def grouped(archive: Archive) -> list[tuple[str, str, bool]]:
    return [(s.key, " ".join(s.members), s.is_duplicate) for s in archive.samples]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a.jpg", "b.jpg", "a.txt"], [("a", "jpg txt", False), ("b", "jpg", False)],
                     id="not-adjacent"),
        pytest.param(["a.jpg", "a.txt", "a.JPG"], [("a", "jpg txt", False), ("a", "jpg", True)],
                     id="duplicate-differs-in-case"),
        pytest.param(["v1.2.jpg", "v1.2.txt"], [("v1.2", "jpg txt", False)], id="dots"),
        pytest.param(["./a.jpg", "a.txt"], [("a", "jpg txt", False)], id="leading-dot"),
        pytest.param(["x/a.jpg", "y/a.jpg"], [("x/a", "jpg", False), ("y/a", "jpg", False)],
                     id="folders-count"),
        pytest.param(["../a.jpg"], [("../a", "jpg", False)], id="traversal-is-a-name"),
        pytest.param([".jpg", "README", "._a.jpg", "a.npy"], [], id="ignored"),
        pytest.param(["a.jpg", "a.syn.json"], [("a", "jpg", False)], id="suffixed-json"),
        pytest.param(["b.jpg", "a.syn.json"], [("b", "jpg", False), ("a.syn", "json", False)],
                     id="orphan-json"),
    ],
)  # fmt: skip
def test_members_group_into_samples(
    tmp_path: Path, names: list[str], expected: list[tuple[str, str, bool]]
) -> None:
    assert grouped(scan(tmp_path, names)) == expected


def test_ignored_members_are_counted(tmp_path: Path) -> None:
    archive = scan(tmp_path, ["README", "._a.jpg", "a.jpg", "a.png", "a.mp3", "a.syn.json"])
    assert archive.notes == {"ignored-members": 4, "ignored-images": 1}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_format(tmp_path: Path, format: int) -> None:
    key = "d" * 90 + "/" + "k" * 95
    archive = scan(tmp_path, [f"{key}.jpg", f"{key}.txt"], format=format)
    assert grouped(archive) == [(key, "jpg txt", False)]
    assert archive.fault is None


def test_name_that_is_no_utf8_is_kept(tmp_path: Path) -> None:
    archive = scan(tmp_path, ["\udce9.jpg"], format=tarfile.GNU_FORMAT)
    assert grouped(archive) == [("\udce9", "jpg", False)]


def test_second_archive_behind_the_first_is_a_fault(tmp_path: Path) -> None:
    scan(tmp_path, ["a.jpg"])
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data + data)
    archive = scan_archive(str(tmp_path / "s.tar"))
    assert cause(archive.fault) == "archive-trailing-data"
    assert grouped(archive) == [("a", "jpg", False)]


def test_archive_cut_anywhere_keeps_its_head(tmp_path: Path) -> None:
    key = "k" * 120
    scan(tmp_path, ["a.jpg", "a.txt", f"{key}.jpg", f"{key}.txt"], format=tarfile.PAX_FORMAT)
    data = (tmp_path / "s.tar").read_bytes().rstrip(b"\0")
    cut = tmp_path / "cut.tar"
    for length in range(2048, len(data), 97):
        cut.write_bytes(data[:length])
        assert grouped(scan_archive(str(cut)))[0] == ("a", "jpg txt", False), length


def test_extended_header_of_absurd_size_is_a_fault(tmp_path: Path) -> None:
    scan(tmp_path, ["a.jpg", "b" * 120 + ".jpg"], format=tarfile.GNU_FORMAT)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    header = 1024
    assert data[header + 156 : header + 157] == tarfile.GNUTYPE_LONGNAME
    data[header + 124 : header + 136] = b"\x80" + (2**62).to_bytes(11, "big")
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "s.tar").write_bytes(data)
    archive = scan_archive(str(tmp_path / "s.tar"))
    assert cause(archive.fault) == "archive-bad-header"
    assert grouped(archive) == [("a", "jpg", False)]


@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), tuple(range(7))])
def test_search_by_halving_finds_exactly_the_bad_images(bad: tuple[int, ...]) -> None:
    images = [bytes([number]) for number in range(7)]

    def check(batch: Sequence[bytes]) -> Fault | None:
        wrong = [image[0] for image in batch if image[0] in bad]
        return Fault("image-decode", str(wrong)) if wrong else None

    expected = {number: Fault("image-decode", str([number])) for number in bad}
    assert find_failures(images, check) == expected


def test_header_of_a_png_is_read_without_inflating_its_text() -> None:
    image = encode("PNG")
    chunk = b"zTXt" + b"k\0\0" + zlib.compress(bytes(2**26))
    bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert check_header(image[:33] + bomb + image[33:], 1000) == ImageHeader("png", 37, 23, 8)
