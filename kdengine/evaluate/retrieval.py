# SPDX-License-Identifier: Apache-2.0
"""Exact retrieval metrics without the whole similarity matrix."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kdengine import distributed
from kdengine.evaluate.embed import ShouldStop, Tokenizer, embed_texts
from kdengine.models import TwoTower

RECALLS = (1, 5, 10)


@torch.no_grad()
def first_positive(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor,
    *,
    chunk: int = 256,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Position of the best positive key in each query's list of keys, from 0.

    Formula: with ``s_ij = query_i . key_j`` and ``p`` the positive (equal label) of largest s_ip,
    the first of them on a tie: ``#{j : s_ij > s_ip} + #{j < p : s_ij = s_ip}``.

    Keys of equal similarity are ordered by number, so a model that gives all keys the same
    similarity gets no better than a list in the given order. Similarities are products in float64
    rounded to float32: equal keys tie exactly, and positions depend neither on ``chunk`` nor on the
    number of ranks.

    Shapes: query [Q, D], key [K, D], query_label [Q], key_label [K]; all whole on every rank.

    Returns:
        Positions [Q], int64, the same on every rank.

    Memory / communication: O(chunk * K); each rank takes every W-th chunk, one all-reduce of [Q].

    Raises:
        ValueError: a query has no positive.
    """
    key_label = key_label.to(key.device)
    query_label = query_label.to(query.device)
    lonely = ~torch.isin(query_label, key_label)
    if bool(lonely.any()):
        raise ValueError(
            f"retrieval: {int(lonely.sum())} of {len(query)} queries have no positive key, "
            f"the first is query {int(lonely.nonzero()[0])} with label "
            f"{int(query_label[lonely][0])}; every query needs one"
        )
    column = torch.arange(len(key), device=key.device)
    transposed = key.double().T
    positions = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    stride = chunk * distributed.world_size(group)
    for start in range(chunk * distributed.rank(group), len(query), stride):
        rows = slice(start, start + chunk)
        similarity = (query[rows].double() @ transposed).float()
        positive = query_label[rows, None] == key_label[None]
        best = similarity.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        tied = similarity == best
        first = torch.where(tied & positive, column, len(key)).amin(dim=1, keepdim=True)
        before = (similarity > best) | (tied & (column < first))
        positions[rows] = before.sum(dim=1)
    if group is not None:
        dist.all_reduce(positions, group=group)
    return positions


def recall_and_rank(positions: Tensor, prefix: str) -> dict[str, float]:
    """Recall at 1, 5, 10 (fractions), mean and median rank (from 1), under open_clip's names.

    The median rank is rounded down to a whole one, as open_clip does.
    """
    position = positions.double()
    metrics = {f"{prefix}_R@{k}": float((position < k).double().mean()) for k in RECALLS}
    metrics[f"{prefix}_mean_rank"] = float(position.mean()) + 1
    metrics[f"{prefix}_median_rank"] = float(position.quantile(0.5).floor()) + 1
    return metrics


def retrieval_metrics(
    image: Tensor, text: Tensor, owner: Tensor, *, group: ProcessGroup | None = None
) -> dict[str, float]:
    """Both directions, with all captions and in the 1-caption protocol.

    With all captions (the usual numbers of Flickr and COCO) an image's list holds every caption of
    every image, and any of its own within the first k is a hit. The 1-caption protocol keeps only
    the first caption of each image (open_clip's validation, CLIP-KD's tables); its names carry
    ``1caption/``.

    Shapes: image [n, D], text [m, D] normalised; owner [m] is the image number of each caption.

    Returns:
        ``{image_to_text,text_to_image}_{R@1,R@5,R@10,mean_rank,median_rank}`` and the same under
        ``1caption/``; recalls are fractions of the images, or of the captions.
    """
    number = torch.arange(len(image), device=owner.device)
    # the first caption of every image, wherever the captions of an image stand
    first = torch.full_like(number, len(owner)).scatter_reduce(
        0, owner, torch.arange(len(owner), device=owner.device), "amin"
    )
    metrics: dict[str, float] = {}
    for prefix, chosen in (("", slice(None)), ("1caption/", first)):
        kept, label = text[chosen], owner[chosen]
        for name, sides in (
            ("image_to_text", (image, kept, number, label)),
            ("text_to_image", (kept, image, label, number)),
        ):
            positions = first_positive(*sides, group=group)
            metrics |= recall_and_rank(positions, prefix + name)
    return metrics


def evaluate_retrieval(
    model: TwoTower,
    image: Tensor,
    texts: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 256,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    should_stop: ShouldStop | None = None,
) -> dict[str, float]:
    """Image-text retrieval over a data set.

    Args:
        model: in evaluation mode.
        image: embedding of each sample [n, D], from ``embed_images``.
        texts: the captions of each sample, the first one first.
        tokenizer: list of n texts -> token ids [n, context].
        batch_size: captions in a forward pass.
        group: the ranks that share the work; None for one process.
        device: where the model is.
        should_stop: see ``embed_images``.

    Returns:
        See ``retrieval_metrics``; the same on every rank.

    Raises:
        ValueError: a sample has no caption.
        RuntimeError: an embedding is not finite.
    """
    empty = [number for number, captions in enumerate(texts) if not captions]
    if empty or not texts:
        raise ValueError(
            f"captions: every sample needs one; {len(empty)} of {len(texts)} have "
            f"none, the first is sample {empty[0] if empty else '-'}"
        )
    flat = [caption for captions in texts for caption in captions]
    counts = torch.tensor([len(captions) for captions in texts])
    owner = torch.repeat_interleave(torch.arange(len(texts)), counts).to(device)
    text = embed_texts(
        model,
        flat,
        tokenizer,
        batch_size=batch_size,
        group=group,
        device=device,
        should_stop=should_stop,
    )
    return retrieval_metrics(image, text, owner, group=group)
