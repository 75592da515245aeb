# SPDX-License-Identifier: Apache-2.0
"""What the index says about a data set, in a table and in a sentence."""

import io
import tarfile
from pathlib import Path

from PIL import Image
from rich.console import Console

from kdengine.data.index import DatasetIndex, ensure_index
from kdengine.data.summary import no_good_sample, summary_table


def make_shard(path: Path, num_samples: int, *, size: int = 8, **texts: str) -> str:
    """Images, each with the given members beside it."""
    image = io.BytesIO()
    Image.new("RGB", (size, size), 99).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            members = {name: text.encode() for name, text in texts.items()}
            for extension, data in {"jpg": image.getvalue(), **members}.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def indexed(shards: str, **options) -> DatasetIndex:
    return ensure_index(shards, num_workers=0, **options)


def test_table_shows_counts_causes_and_speed(tmp_path: Path) -> None:
    make_shard(tmp_path / "0.tar", 3, txt="a cat")
    make_shard(tmp_path / "1.tar", 2, size=9, txt="a cat")
    (tmp_path / "2.tar").touch()
    index = indexed(str(tmp_path), max_pixels=64)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(index))
    lines = [
        line.split("\u2502")[1:3] for line in console.export_text().splitlines() if "\u2502" in line
    ]
    rows = {name.strip(): count.strip() for name, count in lines if name.strip()}
    assert rows == {
        "samples": "5",
        "kept": "3",
        "quarantined": "2",
        "shards": "3",
        "image-pixels": "2",
        "archive-empty": "1",
        "archive-no-good-sample": "1",
    }
    assert "samples/s" in str(summary_table(index).caption)


def test_table_counts_one_thing_in_the_singular(tmp_path: Path) -> None:
    index = indexed(make_shard(tmp_path / "0.tar", 1, txt="a cat"), tokenizers=["simple:77"])
    caption = str(summary_table(index).caption)
    assert "validated 1 sample of 1 shard in" in caption and "tokenised 1 caption in" in caption
    assert str(tmp_path) not in caption


def test_labels_in_place_of_captions_are_hinted_at(tmp_path: Path) -> None:
    make_shard(tmp_path / "0.tar", 2, cls="1")
    make_shard(tmp_path / "1.tar", 1, cls="1", txt="a cat")
    shard = str(tmp_path)
    index = indexed(shard)
    meanings = list(summary_table(index).columns[2].cells)
    assert any("--require label" in str(meaning) for meaning in meanings)
    assert "2 of them have a class label" in no_good_sample(index)
    labelled = indexed(shard, require="label")
    assert labelled.num_samples == 3
    assert not any("--require" in str(cell) for cell in summary_table(labelled).columns[2].cells)
