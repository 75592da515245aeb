# SPDX-License-Identifier: Apache-2.0
"""Why a sample or an archive is quarantined: the codes in `quarantine.jsonl` and their meaning."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One reason: a code of `SAMPLE_CAUSES` or `ARCHIVE_CAUSES`, and the details for a person."""

    cause: str
    detail: str


# in the order in which they are looked for: a sample is quarantined with the first that applies
SAMPLE_CAUSES = {
    "duplicate-key": "the key was seen before in the same shard; the first one is kept",
    "member-unreadable": "reading the bytes of a member or a file failed",
    "file-name": "the path of the image file is not UTF-8, which DALI needs",
    "image-missing": "no member of the sample is an image by its extension",
    "image-link": "a link or a device in an archive, no plain file in a folder",
    "image-empty": "the image member has no bytes",
    "image-truncated": "the archive ends inside the image member",
    "image-bytes": "the image member is larger than an uncompressed image of max_pixels",
    "image-format": "the content is not JPEG, PNG, WebP or BMP, whatever the extension says",
    "image-header": "the header is cut, or states no usable width and height",
    "image-depth": "more than 8 bits a channel",
    "image-pixels": "the header states more than max_pixels pixels",
    "caption-missing": "neither a .txt nor a caption in the .json",
    "caption-empty": "the caption has no printable character",
    "caption-encoding": "the caption is not UTF-8",
    "caption-long": "the caption has more than 65,536 bytes",
    "label-missing": "no .cls member (with require=label)",
    "label-invalid": "the .cls member is not a class number (with require=label)",
    "image-decode": "DALI's CPU decoder refuses the image",
    "image-crash": "DALI's CPU decoder kills its process on this image",
}

ARCHIVE_CAUSES = {
    "archive-missing": "there is no such file",
    "archive-unreadable": "the file, or a folder of images, cannot be read",
    "archive-empty": "the file has no bytes",
    "archive-compressed": "the archive is compressed; DALI reads plain tar only",
    "archive-not-tar": "the file is not a tar archive",
    "archive-no-members": "a tar archive without members, or class folders without an image",
    "archive-truncated": "the archive ends too early; the samples before the end are kept",
    "archive-bad-header": "a member header is damaged; the samples before it are kept",
    "archive-trailing-data": "bytes after the end mark are ignored (concatenated archives?)",
    "archive-no-good-sample": "every sample is quarantined, so the shard leaves the list",
}
