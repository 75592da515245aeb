# SPDX-License-Identifier: Apache-2.0
"""Make shards in img2dataset's layout from a table of image paths and captions."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kdengine import MAX_PIXELS
from kdengine.data.captions import clean_caption
from kdengine.data.causes import Fault
from kdengine.data.imageheader import ImageHeader, check_header
from kdengine.data.progress import Progress, counted
from kdengine.data.table import RAGGED, Entry, Row, read_table
from kdengine.data.validate import BYTES_PER_PIXEL, HEADER_BYTES

# img2dataset's extension for each format
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp"}


@dataclass
class PackReport:
    """What became of the rows of a table; each is packed or rejected.

    Attributes:
        num_rows: rows of the table.
        num_captions: rows whose caption is in a shard (also as one of several of an image).
        num_samples: images in the shards.
        causes: rejected rows by cause (`image-*`, `caption-*` as in the index, `row-fields`).
        ragged: line of the first row that has more or fewer fields than the header; 0 if none.
        shards: the archives written.
        rejected_path: JSON lines that name each rejected row.
    """

    num_rows: int = 0
    num_captions: int = 0
    num_samples: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    ragged: int = 0
    shards: list[str] = field(default_factory=list)
    rejected_path: str = ""

    def __str__(self) -> str:
        """One line for a person."""
        num_rejected = sum(self.causes.values())
        told = [f"{cause} {count:,}" for cause, count in self.causes.most_common()]
        if self.ragged:
            told.append(f"the first row with another number of fields than the header is at line "
                        f"{self.ragged:,}")  # fmt: skip
        tail = f" ({', '.join(told)}; see {self.rejected_path})" if num_rejected else ""
        return (
            f"packed {counted(self.num_samples, 'image')} with "
            f"{counted(self.num_captions, 'caption')} into {counted(len(self.shards), 'shard')}; "
            f"rejected {num_rejected:,} of {counted(self.num_rows, 'row')}" + tail
        )


def pack(
    table: str | Path,
    out_dir: str | Path,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    shard_size: int = 10_000,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> PackReport:
    """Write `00000.tar`, ... from a table with a header row, in the table's order.

    A sample has nine-digit (or longer) keys and the members `.jpg` (`.png`, `.webp`, `.bmp`: by
    content), `.txt` (the first caption) and `.json` (`captions` holds all). The bytes of an image
    are not touched. Rows with the same path make one sample with several captions. A row whose
    file cannot be read, whose header is not that of an 8-bit image, whose caption is blank or no
    UTF-8, or which has more or fewer fields than the header (an unquoted separator in a caption?)
    is rejected and named; whether an image decodes is for `ensure_index` to say.

    Args:
        table: the file, UTF-8.
        out_dir: folder for the shards, made if needed; may not hold shards already.
        image_key: column of the image paths; relative ones start at the table's folder.
        caption_key: column of the captions.
        separator: between columns; None takes a tab if the header has one, else a comma.
        shard_size: images a shard.
        max_pixels: an image whose header states more is rejected.
        progress: show a bar on stderr.

    Raises:
        ValueError: the table is empty or no text, a column is missing, a quote is not closed, or
            shard_size is out of range.
        FileNotFoundError: there is no table.
        FileExistsError: the folder holds shards already.
    """
    if shard_size < 1:
        raise ValueError(f"pack: --shard-size must be at least 1; got {shard_size}")
    if separator is not None and len(separator) != 1:
        raise ValueError(f"pack: --separator must be one character; got {separator!r}")
    table, out_dir = Path(table), Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"pack: {out_dir} is a file; name a folder for the shards")
    if out_dir.exists() and any(out_dir.glob("*.tar")):
        raise FileExistsError(f"pack: {out_dir} holds .tar files already; name an empty folder")
    entries, num_rows = read_table(table, image_key, caption_key, separator)
    out_dir.mkdir(parents=True, exist_ok=True)
    report = PackReport(num_rows=num_rows, rejected_path=str(out_dir / "rejected.jsonl"))
    with Progress(progress) as bars, open(report.rejected_path, "w", encoding="utf-8") as rejected:
        advance = bars.begin("pack", "images", len(entries))
        for shard in _fill(entries, table.parent, shard_size, max_pixels, rejected, report):
            report.num_samples += shard.num_samples
            shard.close()
            report.shards.append(str(shard.path))
            advance(shard.num_seen, shard.num_seen)
    return report


class _Shard:
    """An archive under way; it gets its name when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = self.num_seen = 0
        self._scratch = path.with_suffix(".tar.tmp")
        self._tar = tarfile.open(self._scratch, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        # no time, owner or mode of this machine: equal inputs give equal archives
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()
        os.replace(self._scratch, self.path)
        counts = {"count": self.num_seen, "successes": self.num_samples}
        self.path.with_name(self.path.stem + "_stats.json").write_text(json.dumps(counts) + "\n")


def _fill(
    entries: list[Entry],
    folder: Path,
    shard_size: int,
    max_pixels: int,
    rejected: IO[str],
    report: PackReport,
) -> Iterator[_Shard]:
    """Yield the shards as they are full, still open."""
    digits = max(4, len(str(shard_size - 1)))
    shard: _Shard | None = None
    num_seen = 0
    for entry in entries:
        num_seen += 1
        sample = _check(entry, folder, max_pixels, rejected, report)
        if sample is None:
            continue
        shard = shard or _Shard(Path(report.rejected_path).parent / f"{len(report.shards):05d}.tar")
        key = f"{len(report.shards):05d}{shard.num_samples:0{digits}d}"
        image, header, captions = sample
        record = {
            "key": key,
            "caption": captions[0],
            "captions": captions,
            "status": "success",
            "width": header.width,
            "height": header.height,
            "source": entry.image,
        }
        shard.add(f"{key}.{_EXTENSIONS[header.format]}", image)
        shard.add(f"{key}.txt", captions[0].encode())
        shard.add(f"{key}.json", json.dumps(record).encode())
        shard.num_samples += 1
        if shard.num_samples == shard_size:
            shard.num_seen, num_seen = num_seen, 0
            yield shard
            shard = None
    if shard is not None:
        shard.num_seen = num_seen
        yield shard


def _check(
    entry: Entry, folder: Path, max_pixels: int, rejected: IO[str], report: PackReport
) -> tuple[bytes, ImageHeader, list[str]] | None:
    """The parts of a sample, or None; every row is counted as packed or rejected."""

    def reject(row: Row, fault: Fault) -> None:
        report.causes[fault.cause] += 1
        if fault.cause == RAGGED:
            report.ragged = min(report.ragged or row.line, row.line)
        record: dict[str, Any] = {"row": row.number, "line": row.line, "image": entry.image}
        rejected.write(json.dumps(record | fault._asdict()) + "\n")

    captions = []
    for row in entry.rows:
        found = row.caption if isinstance(row.caption, Fault) else clean_caption(row.caption)
        if isinstance(found, Fault):
            reject(row, found)
        else:
            captions.append((row, found))
    if not captions:
        return None
    image = _read_image(folder, entry.image, max_pixels)
    if isinstance(image, Fault):
        for row, _ in captions:
            reject(row, image)
        return None
    report.num_captions += len(captions)
    return *image, list(dict.fromkeys(caption for _, caption in captions))


def _read_image(folder: Path, name: str, max_pixels: int) -> tuple[bytes, ImageHeader] | Fault:
    path = folder / name
    try:
        if not name:
            return Fault("image-missing", "the row names no file")
        if "://" in name:
            return Fault("image-missing", f"{name} is a URL; download the file first")
        if not path.is_file():
            return Fault("image-missing", f"no file {path}")
        limit = max_pixels * BYTES_PER_PIXEL + HEADER_BYTES
        if path.stat().st_size > limit:
            return Fault("image-bytes", f"more than {limit} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        return Fault("member-unreadable", str(error))
    header = check_header(data, max_pixels)
    return header if isinstance(header, Fault) else (data, header)
