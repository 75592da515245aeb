# SPDX-License-Identifier: Apache-2.0
"""What was removed, to look at: sizes and widths of sets, and a page of images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from kdengine.cache.store import shard_folder
from kdengine.cluster.embeddings import Embeddings
from kdengine.cluster.search import Found
from kdengine.cluster.sets import diameter
from kdengine.data import DatasetIndex, ensure_index
from kdengine.report.curves import INK, MUTED, STYLE
from kdengine.report.markup import Html, jpeg_source, tag

PLOT = "balance.svg"
RULES = {
    "sets": "images closer than the threshold are joined, also by way of others, and the most "
    "central of each set stays",
    "greedy": "in order each image stays that is closer than the threshold to none kept before",
}
COLOUR = "#2563eb"
NUM_SETS, NUM_MEMBERS, THUMBNAIL = 24, 7, 120
MAX_POINTS = 20_000
CSS = (
    "body{font:14px/1.4 system-ui,sans-serif;color:#1f2933;margin:2em;max-width:70em}"
    ".set{display:flex;gap:8px;margin:14px 0;align-items:flex-start}"
    "h2{font-size:13px;margin:1.6em 0 0}"
    "figure{margin:0;width:124px}img{border-radius:4px;display:block;max-width:120px}"
    ".kept img{outline:3px solid #2563eb}figcaption{font-size:11px;color:#52606d}"
)


def draw(path: Path, found: Found, num_rows: int) -> None:
    """Sizes of sets, their largest distances within, and the share kept at every threshold."""
    assert found.sets is not None and found.eps is not None and found.lengths is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        sizes, widths, share = figure.subplots(1, 3)
        counts = np.unique(found.sets.sizes, return_counts=True)
        sizes.scatter(*counts, s=14, color=COLOUR)
        sizes.set(xscale="log", yscale="log", xlabel="images in a set", ylabel="sets")
        _plain(sizes.xaxis, counts[0])
        _plain(sizes.yaxis, counts[1])
        some = slice(None, None, -(-max(1, len(found.sets.sizes)) // MAX_POINTS))
        widths.scatter(found.sets.sizes[some], found.sets.diameters[some], s=8, color=COLOUR)
        widths.axhline(found.eps, color=INK, linewidth=1, linestyle=":")
        widths.set(xscale="log", xlabel="images in a set", ylabel="largest distance within")
        _plain(widths.xaxis, counts[0])
        widths.set_ylim(bottom=0)
        # the curve is exact at every edge; a long one is drawn at some of them
        step = -(-max(1, len(found.lengths)) // MAX_POINTS)
        kept = 100 * (1 - np.arange(1, len(found.lengths) + 1) / num_rows)
        share.plot(found.lengths[::step], kept[::step], color=COLOUR, linewidth=1.8)
        share.axvline(found.eps, color=INK, linewidth=1, linestyle=":")
        share.set(xlabel="threshold (distance)", ylabel="% kept")
        for axes, title in (
            (sizes, "Sizes of sets"),
            (widths, "Width of sets (dotted: threshold)"),
            (share, "Share kept at every threshold"),
        ):
            axes.set_title(title, loc="left", fontsize=9, color=MUTED)
            axes.tick_params(length=0)
        with open(path, "w", encoding="utf-8") as file:
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


def _plain(axis: Axis, values: np.ndarray) -> None:
    """Whole numbers on a logarithmic axis, as many as there is room for."""
    largest = float(max(values, default=1))
    axis.set_view_interval(0.8, 1.5 * largest, ignore=True)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Images:
    """The images of embeddings.

    Attributes:
        index: of their shards.
        begins: number of the first row of each part of the embeddings, ascending.
        firsts: from that to the first sample's number in the index; of shards that were not given
            there is none.
    """

    index: DatasetIndex
    begins: np.ndarray
    firsts: dict[int, int]


def open_images(embeddings: Embeddings, shards: str, index_dir: str | None) -> Images:
    """Find the images of embeddings in shards.

    Raises:
        ValueError: the shards are not those of the embeddings.
    """
    index = ensure_index(shards, index_dir=index_dir, progress=True)
    folders = {str(shard_folder(Path(), shard)): shard for shard in index.shards}
    firsts = {
        part.first: folders[part.folder].first
        for part in embeddings.parts
        if part.folder in folders
    }
    if not firsts:
        raise ValueError(
            f"balance: none of the shards {shards} is one whose embeddings were given; a shard "
            "with other samples or captions than when it was cached counts as another"
        )
    return Images(index, np.array([part.first for part in embeddings.parts]), firsts)


def write_sheet(
    out: Path, embeddings: Embeddings, stands: np.ndarray, told: dict[str, Any], images: Images
) -> Path:
    """A page of removed images, each row a set: first the one that stays, then some that go.

    Sets of all sizes, the largest first, evenly by rank.

    Args:
        out: folder of the results.
        embeddings: the rows.
        stands: number of the row that stays for each.
        told: the manifest.
        images: of the rows.
    """
    eps = told["eps"]
    gone = np.flatnonzero(stands != np.arange(len(stands)))
    owners, counts = np.unique(stands[gone], return_counts=True)
    owners = owners[np.argsort(-counts, kind="stable")]
    shown = np.unique(np.linspace(0, len(owners) - 1, min(NUM_SETS, len(owners))).astype(int))
    rows = []
    for owner in owners[shown]:
        members = np.r_[owner, gone[stands[gone] == owner]]
        some = members[:NUM_MEMBERS]
        x = embeddings.take(members).double()
        distances = torch.linalg.vector_norm(x[: len(some)] - x[0], dim=1).tolist()
        figures = [
            _figure(images, int(row), distance, row == owner)
            for row, distance in zip(some, distances, strict=True)
        ]
        more = len(members) - len(some)
        width = diameter(x, 0)
        head = f"{len(members):,} images, up to {width:.5f} apart"
        rows.append(tag("h2", head + ", wider than the threshold" * (width >= eps)))
        rows.append(tag("div", *figures, f"and {more:,} more" if more else None, class_="set"))
    title = f"{len(gone):,} of {embeddings.num_rows:,} images removed"
    lines: list[object] = [
        f"Rule '{told['rule']}': {RULES[told['rule']]}. The threshold is a distance of {eps:.5f} "
        f"between unit embeddings, a cosine of {1 - eps**2 / 2:.5f}.",
        "Each row is a set: outlined the image that stays, beside it some that it stands for, with "
        f"their distance from it. {len(shown)} of {len(owners):,} sets, from the largest to the "
        "smallest.",
    ]
    if wider := told.get("share_of_sets_wider_than_eps"):
        lines.append(
            f"{wider:.1%} of the sets are wider than the threshold: chains of pairs join images "
            "that are less alike than it says."
        )
    if (out / PLOT).exists():
        link = tag("a", PLOT, href=PLOT)
        lines.append(
            Html(f"{link}: sizes and widths of the sets, the share kept at each threshold")
        )
    head = tag("head", tag("meta", charset="utf-8"), tag("title", title), tag("style", Html(CSS)))
    page = tag("html", head, tag("body", tag("h1", title), *(tag("p", x) for x in lines), *rows))
    path = out / "removed.html"
    path.write_text(f"<!doctype html>\n{page}\n", encoding="utf-8")
    return path


def _figure(images: Images, row: int, distance: float, kept: bool) -> Html:
    begin = int(images.begins[np.searchsorted(images.begins, row, side="right") - 1])
    if begin not in images.firsts:
        return tag("figure", tag("figcaption", "in a shard that was not given"))
    number = images.firsts[begin] + row - begin
    image = Image.open(io.BytesIO(images.index.image_bytes(number))).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    told = "stays" if kept else f"{distance:.5f}"
    caption = tag("figcaption", f"{told} \u00b7 {images.index.key(number)}")
    return tag(
        "figure",
        tag("img", src=jpeg_source(image), alt=""),
        caption,
        class_="kept" if kept else None,
    )
