# SPDX-License-Identifier: Apache-2.0
"""HTML from nested calls; plain text is escaped, so nothing read from a run can break the page."""

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Any

from PIL import Image

VOID = frozenset({"img", "meta", "br", "link"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def render(*children: Any) -> Html:
    """Join children: Html as it is, other values as escaped text, None as nothing, lists flat."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, Iterable) and not isinstance(child, str):
            parts.append(render(*child))
        else:
            parts.append(Html(escape(str(child))))
    return Html("".join(parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; attributes that are None are left out, a trailing underscore is dropped."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{words}>")
    return Html(f"<{name}{words}>{render(*children)}</{name}>")


def note(*children: Any) -> Html:
    """A visible remark about something that is missing or needs care."""
    return tag("p", *children, class_="note")


def jpeg_source(image: Image.Image) -> str:
    """An image as a source that needs no file, for ``img``."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
