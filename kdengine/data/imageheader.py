# SPDX-License-Identifier: Apache-2.0
"""What an image claims to be, read from its first bytes; nothing is ever decoded here.

Image libraries are avoided on purpose: opening a hostile file with one may already inflate
megabytes (compressed text chunks) before the size is known.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from kdengine.data.causes import Fault


class ImageHeader(NamedTuple):
    """Format (`jpeg`, `png`, `webp`, `bmp`), size in pixels, bits a channel."""

    format: str
    width: int
    height: int
    bits: int


# contents that people name .jpg; only for the detail of the fault
_OTHERS = (
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
)
_MARKUP = (b"<?xml", b"<!doctype", b"<html", b"<svg", b"{")
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_NO_PAYLOAD = {0x01, *range(0xD0, 0xD8)}


def check_header(data: bytes, max_pixels: int) -> ImageHeader | Fault:
    """The header of an 8-bit JPEG, PNG, WebP or BMP of at most max_pixels, or the fault.

    Args:
        data: the whole file; few of its bytes are looked at.
        max_pixels: width times height may not exceed it.

    Returns:
        The header, or a `Fault` with a cause `image-*`.
    """
    if not data:
        return Fault("image-empty", "0 bytes")
    reader = _reader(data)
    if reader is None:
        return Fault("image-format", f"the content is {_sniff(data)}")
    try:
        header = reader(data)
    except (struct.error, IndexError, ValueError) as error:
        return Fault("image-header", f"{reader.__name__[6:]} header: {error}")
    size = f"{header.width}x{header.height}"
    if header.width <= 0 or header.height <= 0:
        return Fault("image-header", f"{header.format} header states {size} pixels")
    if header.width * header.height > max_pixels:
        return Fault("image-pixels", f"{header.format} header states {size} pixels, at most "
                     f"max_pixels = {max_pixels} are allowed")  # fmt: skip
    if header.bits > 8:
        return Fault("image-depth", f"{header.format} with {header.bits} bits a channel")
    return header


def _reader(data: bytes) -> Callable[[bytes], ImageHeader] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp
    return _read_bmp if data.startswith(b"BM") else None


def _read_jpeg(data: bytes) -> ImageHeader:
    position = 2
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _NO_PAYLOAD:
            position += 2
        elif marker in _START_OF_FRAME:
            bits, height, width = struct.unpack_from(">BHH", data, position + 4)
            return ImageHeader("jpeg", width, height, bits)
        elif marker in (0xD9, 0xDA):
            raise ValueError("the scan or the end comes before the frame header")
        else:
            (length,) = struct.unpack_from(">H", data, position + 2)
            position += 2 + length


def _read_png(data: bytes) -> ImageHeader:
    length, name, width, height, bits = struct.unpack_from(">I4sIIB", data, 8)
    if name != b"IHDR" or length != 13:
        raise ValueError(f"the first chunk is {name!r}")
    return ImageHeader("png", width, height, bits)


def _read_webp(data: bytes) -> ImageHeader:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if len(data) < 30:
            raise ValueError("cut short")
    elif chunk == b"VP8L":
        signature, packed = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            raise ValueError("wrong lossless signature")
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        start, width, height = struct.unpack_from("<3sHH", data, 23)
        if start != b"\x9d\x01\x2a":
            raise ValueError("wrong start code")
        width, height = width & 0x3FFF, height & 0x3FFF
    else:
        raise ValueError(f"the first chunk is {chunk!r}")
    return ImageHeader("webp", width, height, 8)


def _read_bmp(data: bytes) -> ImageHeader:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    elif 16 <= size <= 124:
        width, height = struct.unpack_from("<ii", data, 18)
    else:
        raise ValueError(f"unknown header of {size} bytes")
    # a negative height means rows from the top down
    return ImageHeader("bmp", width, abs(height), 8)


def _sniff(data: bytes) -> str:
    for magic, name in _OTHERS:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return f"ISO media, brand {data[8:12]!r} (AVIF, HEIC or video)"
    if data[:512].lstrip().lower().startswith(_MARKUP):
        return "text, such as HTML, XML, SVG or JSON"
    return f"unknown, beginning with {data[:8].hex(' ')}"
