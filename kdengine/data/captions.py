# SPDX-License-Identifier: Apache-2.0
"""Captions and labels out of the text members of a sample.

Decisions: a `.txt` that is there decides, good or bad; the `.json` may then add captions but never
save the sample. Without a `.txt` the `.json` speaks. A byte order mark is dropped, control
characters become blanks, outer white space goes. A broken `.json` beside a good `.txt` is no fault.
"""

from __future__ import annotations

import codecs
import json
import re

from kdengine.data.causes import Fault

MAX_CAPTION_BYTES = 65_536
MAX_JSON_BYTES = 16 * 2**20

# C0 and C1 controls and DEL, without tab, line feed and carriage return
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10, 13}, " ")


def clean_caption(text: str) -> str | Fault:
    """The caption as it is stored, or the fault that makes it unusable.

    A text longer than 65,536 bytes is refused because byte-pair encoding takes quadratic time in
    the length of a word; lone surrogates (possible in JSON) are no UTF-8.
    """
    text = text.removeprefix("\ufeff").translate(_CONTROLS).strip()
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        return Fault("caption-encoding", f"character {error.start + 1} is not UTF-8")
    if num_bytes > MAX_CAPTION_BYTES:
        return Fault("caption-long", f"{num_bytes} bytes")
    # format characters (zero-width blanks, direction marks) do not print either
    if not any(character.isprintable() and not character.isspace() for character in text):
        return Fault("caption-empty", "no printable character")
    return text


def decode_caption(data: bytes) -> str | Fault:
    """The caption in the bytes of a `.txt` member, or the fault."""
    if len(data) > MAX_CAPTION_BYTES + len(codecs.BOM_UTF8):
        return Fault("caption-long", f"more than {MAX_CAPTION_BYTES} bytes")
    try:
        return clean_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault("caption-encoding", str(error))


def json_captions(data: bytes) -> list[str]:
    """The usable captions of a `.json` member: its list `captions`, else its `caption`.

    Anything that is not what it should be counts as absent, down to the whole member.
    """
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(record, dict):
        return []
    several = record.get("captions")
    for found in (several if isinstance(several, list) else [], [record.get("caption")]):
        cleaned = [clean_caption(text) for text in found if isinstance(text, str)]
        usable = [text for text in cleaned if isinstance(text, str)]
        if usable:
            return usable
    return []


def sample_captions(txt: bytes | None, record: bytes | None) -> list[str] | Fault:
    """All different captions of a sample, the one of `.txt` first, or the fault.

    Args:
        txt: bytes of the `.txt` member, None if there is none.
        record: bytes of the `.json` member, None if there is none.
    """
    first: list[str] = []
    if txt is not None:
        caption = decode_caption(txt)
        if isinstance(caption, Fault):
            return caption
        first = [caption]
    more = json_captions(record) if record is not None else []
    # equal captions are merged, or a random draw would favour the one that .txt repeats
    captions = list(dict.fromkeys(first + more))
    if captions:
        return captions
    return Fault("caption-missing", "no .txt, and " + (
        "no .json" if record is None else "no usable caption in the .json"))  # fmt: skip


def parse_label(data: bytes) -> int | Fault:
    """The class number in the bytes of a `.cls` member (ASCII digits), or the fault."""
    if re.fullmatch(rb"\s*[0-9]{1,9}\s*", data):
        return int(data)
    return Fault("label-invalid", f"expected digits, got {data[:32]!r}")
