# SPDX-License-Identifier: Apache-2.0
"""Let the exported students of all runs choose captions for a few images of a retrieval set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from kdengine.report.markup import jpeg_source
from kdengine.report.runs import Record

NUM_IMAGES, NUM_CAPTIONS = 8, 200
# how far into a large set images are taken from: the loader reads from its beginning
REACH, BATCH = 1000, 64
THUMBNAIL = 208


@dataclass(frozen=True)
class Pick:
    """What a model answers to one image.

    Attributes:
        caption: the most similar one.
        correct: whether it is one of the image's own.
        rank: place of the image's own caption, from 1.
    """

    caption: str
    correct: bool
    rank: int


@dataclass(frozen=True)
class Sample:
    """One image with its captions, and the pick of every run by its position."""

    source: str
    captions: list[str]
    picks: dict[int, Pick]


@dataclass
class Samples:
    """The chosen images; ``notes`` says what is missing."""

    dataset: str = ""
    num_captions: int = 0
    found: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_captions(runs: Sequence[Record]) -> Samples:
    """Images of the first retrieval set of the runs, with the caption each student picks.

    Every student chooses from one caption each of about 200 images. Nothing here raises: a set or
    an export that cannot be used leaves a note.
    """
    samples = Samples()
    named = [(word, run) for run in runs for word in _sets(run)]
    if not named:
        samples.notes.append("no run names a retrieval set (eval.retrieval) to take images from")
        return samples
    word, owner = named[0]
    samples.dataset, shards = (part.strip() for part in word.split("=", 1))
    models = _load(runs, samples.notes)
    if not models:
        return samples
    # a page without images is better than no page, whatever is wrong with the data
    try:
        _fill(samples, models, shards, _index_options(owner))
    except Exception as error:
        samples.found = []
        samples.notes.append(f"the images of {samples.dataset} cannot be used: {_say(error)}")
    return samples


def _sets(run: Record) -> list[str]:
    """The retrieval sets of a run, each 'NAME=SHARDS'."""
    words = run.get("eval", "retrieval")
    known = words if isinstance(words, list) else []
    return [word for word in known if isinstance(word, str) and "=" in word]


def _index_options(run: Record) -> dict[str, Any]:
    """How the run opened its indexes: any other way would build one of its own."""
    options = {"index_dir": run.get("data", "index_dir")}
    if (max_pixels := run.get("data", "max_pixels")) is not None:
        options["max_pixels"] = max_pixels
    return options


def _load(runs: Sequence[Record], notes: list[str]) -> dict[int, Any]:
    from kdengine.models import load_model

    models = {}
    for i, run in enumerate(runs):
        if not run.export.is_dir():
            notes.append(f"{run.name}: no exported student in {run.export}")
            continue
        try:
            models[i] = load_model(run.export)
        except Exception as error:
            notes.append(f"{run.name}: the exported student cannot be loaded: {_say(error)}")
    return models


def _fill(samples: Samples, models: dict[int, Any], shards: str, options: dict[str, Any]) -> None:
    from kdengine.data import ensure_index

    index = ensure_index(shards, **options)
    if not index.num_samples:
        raise ValueError(f"no good sample in {shards}")
    reach = min(index.num_samples, REACH)
    pool = _spread(reach, NUM_CAPTIONS)
    shown = pool[_spread(len(pool), NUM_IMAGES)]
    pixels = _pixels(index, models, shown)
    texts = [texts[0] for texts in index.texts(pool)]
    own = index.texts(shown)
    samples.num_captions = len(texts)
    answers = {}
    for i, model in models.items():
        try:
            answers[i] = _answer(model, pixels[str(i)], texts, own)
        except Exception as error:
            samples.notes.append(f"{model.spec.name} cannot choose captions: {_say(error)}")
    for n, captions in enumerate(own):
        picks = {i: answer[n] for i, answer in answers.items()}
        samples.found.append(Sample(_source(pixels["thumbnail"][n]), captions, picks))


def _spread(length: int, count: int) -> np.ndarray:
    """About ``count`` different whole numbers, evenly below ``length``."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def _pixels(index: Any, models: dict[int, Any], numbers: np.ndarray) -> dict[str, torch.Tensor]:
    """The chosen images as every model wants them, and as thumbnails, in one pass."""
    from kdengine.data import ViewSpec, build_loader

    views = {"thumbnail": ViewSpec(THUMBNAIL, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    for i, (_, spec) in models.items():
        p = spec.preprocess
        views[str(i)] = ViewSpec.like(p)
    loader = build_loader(
        index, views=views, tokenizers={}, batch_size=BATCH, num_threads=2, train=False
    )
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in views}
    wanted = torch.from_numpy(numbers)
    try:
        for batch in loader:
            rows = torch.isin(batch["sample"], wanted) & batch["valid"]
            for name in views:
                kept[name].append(batch[name][rows])
            if int(batch["sample"].max()) >= int(numbers[-1]):
                break
    finally:
        loader.close()
    return {name: torch.cat(parts) for name, parts in kept.items()}


@torch.no_grad()
def _answer(model: Any, pixels: torch.Tensor, texts: list[str], own: list[list[str]]) -> list[Pick]:
    from kdengine.data.tokenize import load_tokenizer

    tower, spec = model
    tokenizer = load_tokenizer(spec.tokenizer)
    image = F.normalize(tower.encode_image(pixels).float(), dim=-1)
    parts = [
        tower.encode_text(torch.as_tensor(tokenizer(texts[i : i + BATCH])))
        for i in range(0, len(texts), BATCH)
    ]
    similarity = image @ F.normalize(torch.cat(parts).float(), dim=-1).T
    if not torch.isfinite(similarity).all():
        raise ValueError(f"the embeddings of {spec.name} are not finite")
    picks = []
    for row, captions in zip(similarity, own, strict=True):
        # two images may share the wording of a caption: either of them is right
        right = torch.tensor([text in captions for text in texts])
        best = int(row.argmax())
        rank = 1 + int((row > row[right].max()).sum())
        picks.append(Pick(texts[best], bool(right[best]), rank))
    return picks


def _source(pixels: torch.Tensor) -> str:
    """An image [3, S, S] of 0 to 1 for a page."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return jpeg_source(Image.fromarray(array))


def _say(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."
