# SPDX-License-Identifier: Apache-2.0
"""Images and texts to unit embeddings, each rank doing its share.

Every rank makes the same number of forward passes and collectives, and ends with all embeddings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kdengine import distributed
from kdengine.data import DatasetIndex, Loader, ViewSpec
from kdengine.data.loader import build_loader
from kdengine.models import TowerSpec, TwoTower

Tokenizer = Callable[[list[str]], Any]
ShouldStop = Callable[[], bool]


class Abandoned(Exception):
    """The caller's ``should_stop`` asked to give up; raised on all ranks together."""


def image_loader(
    spec: TowerSpec,
    index: DatasetIndex,
    batch_size: int,
    num_threads: int,
    device: torch.device | str,
    group: ProcessGroup | None = None,
) -> Loader:
    """One pass over the images of an index, as a model of this spec wants them.

    Args:
        spec: what the model eats.
        index: from ``ensure_index``.
        batch_size: images on each rank.
        num_threads: decoding threads.
        device: where to decode.
        group: the ranks that share the images; None for one process.

    Raises:
        ValueError, RuntimeError: see ``build_loader``.
    """
    where = torch.device(device)
    device_id = None
    if where.type == "cuda":
        device_id = torch.cuda.current_device() if where.index is None else where.index
    return build_loader(
        index,
        views={"image": ViewSpec.like(spec.preprocess)},
        tokenizers={},
        batch_size=batch_size,
        rank=distributed.rank(group),
        world_size=distributed.world_size(group),
        num_threads=num_threads,
        seed=0,
        train=False,
        device_id=device_id,
    )


@torch.no_grad()
def embed_images(
    model: TwoTower,
    loader: Iterable[Mapping[str, Tensor]],
    num_samples: int,
    *,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Embed every sample of a finite loader.

    Args:
        model: in evaluation mode.
        loader: yields ``image`` [b, 3, S, S], ``sample`` [b] (number in the data set) and ``valid``
            [b] (false for padding); the same number of batches on every rank.
        num_samples: samples in the data set, over all ranks.
        group: the ranks that share the work; None for one process.
        device: where the model is.
        should_stop: asked after every batch on every rank; true on all ranks together gives up.

    Returns:
        L2-normalised embeddings [num_samples, D], fp32, row i of sample i; the same on every rank.

    Memory / communication: O(num_samples * D); one all-gather at the end.

    Raises:
        RuntimeError: the loader did not bring every sample exactly once, or an embedding is not
            finite; on every rank alike.
        Abandoned: see ``should_stop``.
    """
    rows, numbers = [], []
    for batch in loader:
        rows.append(_unit(model.encode_image(batch["image"].to(device))))
        sample, valid = batch["sample"].to(device), batch["valid"].to(device)
        numbers.append(torch.where(valid, sample, -1))
        _maybe_abandon(should_stop)
    if not rows:
        raise RuntimeError(
            f"images: expected {num_samples} over all ranks, the loader gave no batch; is the data "
            "set empty?"
        )
    row = distributed.gather_constant(torch.cat(rows), group)
    number = distributed.gather_constant(torch.cat(numbers), group)
    row, number = row[number >= 0], number[number >= 0]
    seen = torch.bincount(number, minlength=num_samples)
    if len(seen) > num_samples or not bool((seen == 1).all()):
        raise RuntimeError(
            f"images: expected each of {num_samples} samples once; "
            f"{int((seen[:num_samples] == 0).sum())} are missing, {int((seen > 1).sum())} came "
            f"more than once, {len(seen) - min(len(seen), num_samples)} numbers are too large"
        )
    _check_finite(row, "images", number)
    return torch.empty_like(row).index_copy_(0, number, row)


@torch.no_grad()
def embed_texts(
    model: TwoTower,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 256,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Embed texts, given whole on every rank.

    The texts are cut into batches of one size, whatever the number of ranks, and dealt out; so the
    arithmetic of a text does not depend on how many ranks there are.

    Returns:
        L2-normalised embeddings [len(texts), D], fp32; the same on every rank.

    Memory / communication: O(len(texts) * D); one all-gather at the end.

    Raises:
        ValueError: there is no text.
        RuntimeError: an embedding is not finite; on every rank alike.
        Abandoned: see ``embed_images``.
    """
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    world, rank = distributed.world_size(group), distributed.rank(group)
    size = min(batch_size, len(texts))
    num_batches = -(-len(texts) // size)
    rows = []
    for first in range(0, num_batches, world):
        start = (first + rank) * size
        chosen = list(texts[start : start + size])
        # a last short batch, and a rank without one, still make a full forward pass
        chosen += [texts[0]] * (size - len(chosen))
        tokens = torch.as_tensor(tokenizer(chosen)).to(device=device, dtype=torch.int64)
        rows.append(_unit(model.encode_text(tokens)))
        _maybe_abandon(should_stop)
    gathered = distributed.gather_constant(torch.cat(rows), group)
    # [rank, round, size, D] -> the order in which the batches were dealt
    dealt = gathered.view(world, len(rows), size, -1).transpose(0, 1)
    unit = dealt.reshape(world * len(rows) * size, -1)[: len(texts)].contiguous()
    _check_finite(unit, "texts", torch.arange(len(texts)))
    return unit


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _maybe_abandon(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Abandoned


def _check_finite(rows: Tensor, what: str, numbers: Tensor) -> None:
    bad = ~torch.isfinite(rows).all(dim=1)
    if bool(bad.any()):
        some = numbers.to(bad.device)[bad][:5].tolist()
        raise RuntimeError(
            f"{what}: the embeddings of {int(bad.sum())} of {len(rows)} are not finite "
            f"(first numbers: {some}); the weights have diverged: evaluate an earlier checkpoint"
        )
