# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: class names and prompt templates against images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kdengine.data.split import half
from kdengine.evaluate.embed import ShouldStop, Tokenizer, embed_texts
from kdengine.evaluate.prompts import fill
from kdengine.evaluate.protocols import BASE, HARMONIC, NOVEL, harmonic_mean
from kdengine.evaluate.retrieval import first_positive
from kdengine.models import TwoTower


def class_embeddings(
    model: TwoTower,
    classnames: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer,
    **options: Any,
) -> Tensor:
    """One unit embedding a class: the normalised mean over templates of normalised embeddings.

    Returns:
        [C, D], fp32, the same on every rank; equal to the columns of
        ``open_clip.build_zero_shot_classifier``.

    Raises:
        RuntimeError: an embedding is not finite.
    """
    texts = [fill(template, name) for name in classnames for template in templates]
    rows = embed_texts(model, texts, tokenizer, **options)
    return F.normalize(rows.view(len(classnames), len(templates), -1).mean(dim=1), dim=-1)


def zeroshot_metrics(
    image: Tensor, classes: Tensor, labels: Tensor, *, group: ProcessGroup | None = None
) -> dict[str, float]:
    """Accuracy of the nearest class.

    Of classes at equal similarity the one of smaller number wins.

    Shapes: image [n, D], classes [C, D] normalised; labels [n] in [0, C).

    Returns:
        ``zeroshot-top1``, ``zeroshot-top5`` (1 for five classes or fewer),
        ``zeroshot-mean-per-class-recall`` over the classes that have an image, all fractions; and
        ``zeroshot-classes``, how many competed.
    """
    number = torch.arange(len(classes), device=classes.device)
    labels = labels.to(image.device)
    position = first_positive(image, classes, labels, number, group=group)
    correct = (position < 1).double()
    total = torch.bincount(labels, minlength=len(classes)).double()
    hits = torch.zeros_like(total).index_add_(0, labels, correct)
    return {
        "zeroshot-top1": float(correct.mean()),
        "zeroshot-top5": float((position < 5).double().mean()),
        "zeroshot-mean-per-class-recall": float((hits[total > 0] / total[total > 0]).mean()),
        "zeroshot-classes": float(len(classes)),
    }


def half_metrics(
    image: Tensor, classes: Tensor, labels: Tensor, *, group: ProcessGroup | None = None
) -> dict[str, float]:
    """The base-to-novel protocol: accuracy of images of each half, among classes of that half.

    Shapes: as ``zeroshot_metrics``.

    Returns:
        ``base-top1``, ``novel-top1`` and their ``harmonic-mean``, fractions; nothing where a half
        has no image.
    """
    found = {}
    for name, which in ((BASE, "base"), (NOVEL, "novel")):
        numbers = half(len(classes), which)
        own = (labels >= numbers.start) & (labels < numbers.stop)
        if not bool(own.any()):
            return {}
        rows, keys = image[own.to(image.device)], classes[numbers.start : numbers.stop]
        competing = labels[own] - numbers.start
        found[name] = zeroshot_metrics(rows, keys, competing, group=group)["zeroshot-top1"]
    return {**found, HARMONIC: harmonic_mean(found[BASE], found[NOVEL])}


def evaluate_zeroshot(
    model: TwoTower,
    image: Tensor,
    labels: Any,
    classnames: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer,
    *,
    halves: bool = False,
    batch_size: int = 256,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    should_stop: ShouldStop | None = None,
) -> dict[str, float]:
    """Zero-shot classification of a data set.

    Args:
        model: in evaluation mode.
        image: embedding of each sample [n, D], from ``embed_images``.
        labels: class of each sample [n].
        classnames: name of each class.
        templates: prompts with ``{}`` or ``{c}``.
        tokenizer: list of n texts -> token ids [n, context].
        halves: also of each half of the classes among themselves, see ``half_metrics``.
        batch_size: prompts in a forward pass.
        group: the ranks that share the work; None for one process.
        device: where the model is.
        should_stop: see ``embed_images``.

    Returns:
        See ``zeroshot_metrics``; the same on every rank.

    Raises:
        ValueError: a label is not the number of a class.
        RuntimeError: an embedding is not finite.
    """
    label = torch.as_tensor(labels).to(torch.int64)
    check_labels(label, len(classnames))
    classes = class_embeddings(
        model,
        classnames,
        templates,
        tokenizer,
        batch_size=batch_size,
        group=group,
        device=device,
        should_stop=should_stop,
    )
    metrics = zeroshot_metrics(image, classes, label, group=group)
    return metrics | (half_metrics(image, classes, label, group=group) if halves else {})


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class, naming the first.

    Raises:
        ValueError: there is no label, or one lies outside [0, num_classes).
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if not len(labels) or bool(wrong.any()):
        first = int(wrong.nonzero()[0]) if bool(wrong.any()) else -1
        what = f"sample {first} has label {int(labels[first])}" if first >= 0 else "no sample"
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, one for each class name; {what} "
            f"({int(wrong.sum())} of {len(labels)} are wrong; -1 means no .cls member); do the "
            "class names belong to these shards?"
        )
