# SPDX-License-Identifier: Apache-2.0
"""A table of image paths and captions, as `kdengine pack` reads it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdengine.data.causes import Fault
from kdengine.data.progress import counted

# the cause of a row with another number of fields than the header
RAGGED = "row-fields"


class Row(NamedTuple):
    """A row of the table: its number from 1, its first line in the file, its caption."""

    number: int
    line: int
    caption: str | Fault


@dataclass
class Entry:
    """One image and the rows that name it."""

    image: str
    rows: list[Row]


def read_table(
    table: Path, image_key: str, caption_key: str, separator: str | None
) -> tuple[list[Entry], int]:
    """The images in the order of their first row with all their rows, and the number of rows.

    Args:
        table: the file, with a header row.
        image_key: column of the image paths.
        caption_key: column of the captions.
        separator: between columns; None takes a tab if the header has one, else a comma.

    Raises:
        ValueError: the file is empty or no text, has not one column of each name, or a quote is
            not closed.
        FileNotFoundError: there is no file.
    """
    _check_text(table)
    csv.field_size_limit(sys.maxsize)
    entries: dict[str, Entry] = {}
    num_rows = 0
    # bytes that are no UTF-8 must cost their row only; the caption check finds them
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        chosen = separator or ("\t" if "\t" in header else ",")
        rows = _rows(table, csv.reader(file, delimiter=chosen, strict=True))
        _, columns = next(rows, (1, []))
        image_column = _column(table, columns, chosen, "--image-key", image_key)
        caption_column = _column(table, columns, chosen, "--caption-key", caption_key)
        for num_rows, (line, fields) in enumerate(rows, 1):
            image = fields[image_column] if image_column < len(fields) else ""
            caption: str | Fault = Fault(
                RAGGED, f"{counted(len(fields), 'field')}, the header has {len(columns)}"
            )
            if len(fields) == len(columns):
                caption = fields[caption_column]
            entry = entries.setdefault(image, Entry(image, []))
            entry.rows.append(Row(num_rows, line, caption))
    if not num_rows:
        raise ValueError(f"pack: {table} has a header and no rows; there is nothing to pack")
    return list(entries.values()), num_rows


def _rows(table: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with its first line in the file."""
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        # read on, a quote that is not closed would swallow every row up to the next one
        raise ValueError(
            f"pack: {table}: in the row that starts at line {line} a quote opens and is not "
            f"closed, or text follows the closing one ({error}); mend the row: a quote within a "
            'quoted text is written twice ("")'
        ) from None


def _check_text(table: Path) -> None:
    """Refuse what is no table of text before its bytes come up in some message."""
    if not table.is_file():
        what = "is a folder" if table.is_dir() else "does not exist"
        raise FileNotFoundError(f"pack: {table} {what}; expected a table of image paths, as text")
    with open(table, "rb") as file:
        head = file.read(65_536)
    if not head.strip():
        raise ValueError(f"pack: {table} is empty; expected a header row with the column names")
    try:
        is_text = b"\0" not in head and bool(head.partition(b"\n")[0].decode())
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise ValueError(
            f"pack: {table} is not a text table in UTF-8; export it as CSV or TSV in that encoding"
        )


def _column(table: Path, columns: list[str], separator: str, option: str, key: str) -> int:
    if columns.count(key) == 1:
        return columns.index(key)
    has = ", ".join(repr(name[:40]) for name in columns[:20]) + (", ..." if columns[20:] else "")
    wrong = "two columns" if key in columns else "no column"
    raise ValueError(
        f"pack: {table} has {wrong} {key!r}; with the separator {separator!r} its columns are "
        f"{has}. Name the right one with {option}, or another --separator"
    )
