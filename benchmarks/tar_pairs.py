# SPDX-License-Identifier: Apache-2.0
"""Shards as a torch ``Dataset``: Pillow decodes, open_clip transforms and tokenises."""

import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kdengine.data import DatasetIndex, ViewSpec
from kdengine.data.tokenize import load_tokenizer


class TarPairs(Dataset[tuple[Tensor, Tensor]]):
    """The good samples of an index, by number, as Pillow reads them out of the tars.

    The first caption of each is in memory as text and is tokenised when it is asked for.
    """

    def __init__(self, index: DatasetIndex, view: ViewSpec, tokenizer_id: str) -> None:
        self.places = [
            (shard.tar, *place) for shard in index.shards for place in read_places(shard.idx)
        ]
        numbers = torch.arange(index.num_samples).numpy()
        self.captions = [texts[0] for texts in index.texts(numbers)]
        self.transform = open_clip.image_transform(
            view.size, is_train=True, mean=view.mean, std=view.std
        )
        self.tokenizer = load_tokenizer(tokenizer_id)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.image(number)), self.tokens(number)

    def image(self, number: int) -> Image.Image:
        """The stored image, not yet decoded."""
        tar, offset, size = self.places[number]
        return Image.open(io.BytesIO(os.pread(_open(tar), size, offset)))

    def tokens(self, number: int) -> Tensor:
        """Token ids of the first caption."""
        return self.tokenizer([self.captions[number]])[0]


@functools.cache
def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def read_places(idx: str) -> list[tuple[int, int]]:
    """Offset and size of each image in its tar, from a DALI index."""
    lines = Path(idx).read_text(encoding="utf-8").splitlines()[1:]
    return [(int(offset), int(size)) for _, offset, size, _ in map(str.split, lines)]


class Endless(Sampler[int]):
    """All numbers in a new random order, again and again: no worker waits for a pass to end."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.length).tolist()
