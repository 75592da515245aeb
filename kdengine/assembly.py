# SPDX-License-Identifier: Apache-2.0
"""From a configuration to models and data, and to the table that says what they are."""

import hashlib
import json
import math
import os
from typing import Any, NamedTuple

import torch
from torch import nn

from kdengine import models
from kdengine.cache import CachedTeachers, Store, check_teachers
from kdengine.config import RunConfig
from kdengine.data import (
    ClusterRows,
    Replay,
    ViewSpec,
    build_loader,
    build_synthetic_loader,
    ensure_index,
)
from kdengine.data.progress import counted
from kdengine.data.shards import folders_told
from kdengine.methods import needs_teacher, teacher_missing
from kdengine.models import Student, TowerSpec
from kdengine.ranks import Ranks
from kdengine.teachers import LiveTeachers, Teachers, size


class Data(NamedTuple):
    """What a run trains on.

    Attributes:
        loader: endless iterator over batches.
        identity: what must be the same for a position in the data to mean the same; free of paths.
        rows: for the run's header.
    """

    loader: Any
    identity: dict[str, Any]
    rows: dict[str, str]


def build_student(config: RunConfig) -> Student:
    """The student, equal on all ranks.

    Raises:
        ValueError: it cannot be built, or not trained in the precision.
    """
    student = models.build_student(
        config.model.model,
        config.model.pretrained,
        grad_checkpointing=config.model.grad_checkpointing,
        seed=config.train.seed,
    )
    refuse_bf16_statistics(config.train.precision, config.model.model, student.tower)
    return student


def build_teachers(
    config: RunConfig, ranks: Ranks, student: TowerSpec, store: Store | None = None
) -> Teachers | None:
    """The method's teachers, on this rank's device; None for a method without.

    Args:
        config: of the run.
        ranks: for their device.
        student: what it sees, teachers that want the same share.
        store: the run's cache.

    Raises:
        ValueError: the method needs a teacher and none is named, or one cannot be built.
    """
    if not needs_teacher(config.method):
        return None
    if store is not None and not config.distill.cache_live:
        return CachedTeachers(store, teacher_dtype(config), ranks.device)
    return LiveTeachers(load_teachers(config, ranks), student)


def load_teachers(config: RunConfig, ranks: Ranks) -> list[models.Teacher]:
    """The configured teachers, on this rank's device.

    Raises:
        ValueError: none is named, or one cannot be built.
    """
    named = config.distill.teachers()
    if not named:
        raise teacher_missing(config.method.name)
    dtype = teacher_dtype(config)
    return [
        models.build_teacher(model, pretrained, dtype=dtype, device=ranks.device)
        for model, pretrained in named
    ]


def teacher_dtype(config: RunConfig) -> torch.dtype:
    """In which precision teachers compute and hand out embeddings."""
    precision = config.distill.distill_precision
    low = precision == "bf16" or (precision == "auto" and config.train.precision != "fp32")
    return torch.bfloat16 if low else torch.float32


def open_cache(config: RunConfig, ranks: Ranks) -> Store | None:
    """The configured cache, once it is known to be of the configured teachers; None without one.

    A method without a teacher trains on its crops all the same, to be compared with one that has.

    Raises:
        FileNotFoundError, ValueError: it cannot be used, or is of other teachers.
    """
    distill = config.distill
    if distill.cache is None:
        return None
    with_rows = needs_teacher(config.method) and not distill.cache_live
    store = Store(distill.cache, with_rows=with_rows)

    def check() -> None:
        check_teachers(store.manifest, distill.teachers(), distill.distill_precision)

    # one rank is enough: this may read the whole file of the weights
    ranks.first_only(check, "cache")
    return store


def refuse_bf16_statistics(precision: str, name: str, student: nn.Module) -> None:
    """Refuse pure bf16 for a student with batch norms.

    The engine casts parameters and leaves running statistics in fp32, and torch takes no mix.

    Raises:
        ValueError: the student has a batch norm and the precision is bf16.
    """
    batch_norms = (nn.modules.batchnorm._BatchNorm,)
    if precision == "bf16" and any(isinstance(module, batch_norms) for module in student.modules()):
        raise ValueError(
            f"train.precision: bf16 came, but {name} has batch norms, whose running statistics "
            "stay in fp32; use --train.precision amp_bf16"
        )


def build_data(
    config: RunConfig,
    ranks: Ranks,
    student: TowerSpec,
    teachers: Teachers | None,
    replay: Replay | None = None,
    clusters: ClusterRows | None = None,
) -> Data:
    """The training loader and what it is about.

    A batch holds ``image`` and ``tokens`` for the student, what the teachers want beside them, and
    what ``clusters`` store of the images. With ``replay`` images are its stored views.

    Raises:
        ValueError: no training data, or none of its samples is good.
    """
    views = {"image": ViewSpec.like(student.preprocess)}
    tokenizers = {"tokens": student.tokenizer}
    if teachers is not None:
        views |= teachers.views()
        tokenizers |= teachers.tokenizers()
    device_id = ranks.local_rank if ranks.device.type == "cuda" else None
    shared: dict[str, Any] = {
        "views": views,
        "tokenizers": tokenizers,
        "batch_size": config.train.batch_size,
        "accum_freq": config.train.accum_freq,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "seed": config.train.seed,
        "device_id": device_id,
    }
    if config.data.dataset_type == "synthetic":
        if replay is not None:
            raise ValueError(
                "distill.cache: synthetic data is in no cache; give --data.train-data, or no cache"
            )
        if config.data.keep is not None:
            raise ValueError(
                "data.keep: synthetic data has no keep list; give --data.train-data, or no list"
            )
        if clusters is not None:
            raise ValueError(
                "method.clip_cid.clusters: synthetic data is in no clusters; give --data.train-data"
            )
        num_samples = config.data.train_num_samples
        loader = build_synthetic_loader(num_samples, **shared)
        identity = {"num_samples": num_samples, "shards": "synthetic"}
        return Data(loader, identity, {"samples": f"{num_samples} (synthetic)"})
    index = open_index(config, ranks, sorted(set(tokenizers.values())))
    if (lists := config.data.keep) is not None:
        index = ranks.first_then_all(lambda: index.keep(lists), "data.keep")
    if replay is not None:
        # one rank is enough: this looks at every file of the cache
        ranks.first_only(lambda: replay.check(index), "cache")
        replay.attach(index)
    if clusters is not None:
        ranks.first_only(lambda: clusters.check(index), "clusters")
        clusters.attach(index)
    loader = build_loader(
        index,
        **shared,
        train=True,
        num_threads=config.data.workers,
        shuffle_buffer=config.data.shuffle_buffer,
        caption=config.data.caption,
        replay=replay,
        clusters=clusters,
    )
    rows = {
        "samples": f"{index.num_samples} in {counted(len(index.shards), 'shard')}",
        "quarantined": f"{index.num_quarantined}",
    }
    if index.kept is not None:
        share = index.num_read / index.num_samples
        rows["kept"] = f"{index.num_read} of these ({share:.1%}), by {config.data.keep}"
    if index.num_listed > len(index.shards):
        rows["samples"] += f", of {index.num_listed} listed: the others hold no good sample"
    if told := folders_told(config.data.train_data):
        rows["shards"] = "; ".join(told)
    if index.num_quarantined:
        rows["quarantined"] += f", listed in {index.quarantine_paths[0]}"
    shards = [
        (os.path.basename(shard.tar), os.path.getsize(shard.tar), shard.num_samples)
        for shard in index.shards
    ]
    content = json.dumps(shards if index.kept is None else [shards, index.kept])
    digest = hashlib.sha256(content.encode()).hexdigest()
    identity = {"num_samples": index.num_read, "shards": digest}
    if clusters is not None:
        identity["clusters"] = clusters.digest
    return Data(loader, identity, rows)


def open_index(config: RunConfig, ranks: Ranks, tokenizers: list[str]) -> Any:
    """The index of the training data; rank 0 builds what is missing while the others wait."""
    if not config.data.train_data:
        raise ValueError(
            "data: expected shards to train on, got none; give --data.train-data 'SHARDS', or "
            "--data.dataset-type synthetic for a benchmark"
        )

    def ensure() -> Any:
        return ensure_index(
            config.data.train_data,
            index_dir=config.data.index_dir,
            tokenizers=tokenizers,
            max_pixels=config.data.max_pixels,
            progress=ranks.first,
        )

    return ranks.first_then_all(ensure, "index")


def num_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Length of the run in optimiser steps.

    Raises:
        ValueError: the configuration gives no length.
    """
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ValueError(
            "train: expected a length, got none; give --train.steps N or --train.epochs N"
        )
    return max(1, math.ceil(config.train.epochs * steps_per_epoch))


def header(
    config: RunConfig,
    ranks: Ranks,
    student: Student,
    teachers: Teachers | None,
    steps_per_epoch: int,
    total: int,
    clusters: str = "",
) -> dict[str, str]:
    """Rows that say what is about to run; ``clusters`` says what it learns of."""
    rows = {"student": size(student.spec, student.tower)}
    if teachers is not None:
        rows |= teachers.rows()
    if clusters:
        rows["clusters"] = clusters
    batch, accum_freq = config.train.batch_size, config.train.accum_freq
    rows["method"] = config.method.name
    rows["ranks"] = f"{ranks.world_size} on {ranks.device.type}"
    parts = f" in {accum_freq} micro-batches" if accum_freq > 1 else ""
    own = batch * accum_freq
    rows["batch"] = f"{own} on a rank{parts}, {own * ranks.world_size} in all"
    rows["steps"] = f"{total}, {steps_per_epoch} an epoch"
    if config.prune.target:
        share, steps = config.prune.target, config.prune.steps
        rows["pruning"] = f"masks for {steps} steps, then a cut that leaves {1 - share:.0%}"
    rows["precision"] = f"{config.train.precision}, ZeRO stage {config.train.zero_stage}"
    return rows
