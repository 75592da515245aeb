# SPDX-License-Identifier: Apache-2.0
"""The table that `kdengine index` prints."""

from __future__ import annotations

from rich.table import Table

from kdengine.data.archive import LABELS_ONLY
from kdengine.data.causes import ARCHIVE_CAUSES, SAMPLE_CAUSES
from kdengine.data.index import DatasetIndex
from kdengine.data.progress import counted

_NOTES = {
    LABELS_ONLY: "samples with a class label in place of a caption: --require label keeps them",
    "ignored-members": "members that are no image, caption or label",
    "ignored-images": "second images of a sample; the first of jpg, png, jpeg, webp is taken",
    "no-end-mark": "archives without the blocks of zeros at the end; nothing is lost",
}


def summary_table(index: DatasetIndex) -> Table:
    """Counts of an index for a person: what is kept, what is not and why, and the speed."""
    counts = index.summary()
    table = Table(title="index", title_justify="left", caption=_footer(index))
    table.caption_justify = "left"
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("meaning")
    table.add_row("samples", f"{counts['samples']:,}", "found in the archives")
    table.add_row("kept", f"{counts['kept']:,}", f"with {counted(counts['captions'], 'caption')}")
    table.add_row("quarantined", f"{counts['quarantined']:,}", "see quarantine.jsonl")
    table.add_row("shards", f"{counts['shards']:,}", f"{counts['shards_used']:,} of them used")
    for known, found in (
        (SAMPLE_CAUSES, counts["causes"]),
        (ARCHIVE_CAUSES, counts["archives"]),
        (_NOTES, counts["notes"]),
    ):
        if found:
            table.add_section()
        for cause, meaning in known.items():
            if cause in found:
                table.add_row(cause, f"{found[cause]:,}", meaning)
    return table


def _footer(index: DatasetIndex) -> str:
    stats = index.stats
    lines = []
    if stats.num_shards:
        rate = stats.num_samples / max(stats.validate_time_s, 1e-9)
        lines.append(
            f"validated {counted(stats.num_samples, 'sample')} of "
            f"{counted(stats.num_shards, 'shard')} in {stats.validate_time_s:.1f} s "
            f"({rate:,.0f} samples/s)"
        )
    if stats.num_captions:
        rate = stats.num_captions / max(stats.tokenize_time_s, 1e-9)
        lines.append(
            f"tokenised {counted(stats.num_captions, 'caption')} in {stats.tokenize_time_s:.1f} s "
            f"({rate:,.0f} captions/s)"
        )
    if not lines:
        lines.append("the index was up to date")
    return "\n".join(lines)


def refuse_empty(index: DatasetIndex, who: str = "data: ") -> None:
    """Refuse an index without a good sample.

    Raises:
        ValueError: why it is empty, and where that is listed.
    """
    if not index.num_samples:
        raise ValueError(f"{who}{no_good_sample(index)}; see {index.quarantine_paths[0]}")


def no_good_sample(index: DatasetIndex) -> str:
    """Why an index is empty, in a sentence without a subject, with the mend where one is known."""
    counts = index.summary()
    causes = {**counts["causes"], **counts["archives"]}
    causes.pop("archive-no-good-sample", None)
    told = ", ".join(f"{cause} {count:,}" for cause, count in causes.items())
    text = f"no good sample among {counts['samples']:,} ({told})"
    if labelled := counts["notes"].get(LABELS_ONLY):
        text += f"; {counted(labelled, 'of them has', 'of them have')} a class label in place of "
        text += "a caption: index them with --require label, evaluate them with --zeroshot"
    return text
