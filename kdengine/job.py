# SPDX-License-Identifier: Apache-2.0
"""A training run before its first step: ranks, models, data, engine, log, put together."""

import contextlib
import gc
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdengine import assembly, checkpoint, clustering, prompting, ranks
from kdengine.centres import Centres
from kdengine.checkpoint import State
from kdengine.config import Eval, RunConfig, to_toml
from kdengine.distributed import Exchange
from kdengine.engineconfig import deepspeed_config
from kdengine.evaluate import EvalSet, Evaluator, parse_eval_sets
from kdengine.log import RunLog
from kdengine.methods import build_method, build_root
from kdengine.models import TowerSpec, build_from_spec
from kdengine.optimizer import Buffers, build_optimizer
from kdengine.pruning import BUDGET_TOLERANCE, Pruning, View, lacking
from kdengine.ranks import Heartbeat, Ranks
from kdengine.stop import Stop
from kdengine.teachers import Teachers


@dataclass
class Job:
    """What the loop works with."""

    config: RunConfig
    ranks: Ranks
    stop: Stop
    heartbeat: Heartbeat
    folder: Path
    log: RunLog
    student: TowerSpec
    teachers: Teachers | None
    engine: Any
    loader: Any
    evaluator: Evaluator | None
    identity: dict[str, Any]
    total: int
    state: State
    buffers: Buffers
    pruning: Pruning | None
    centres: Centres | None

    @property
    def num_pairs(self) -> int:
        """Pairs that a step's loss sees, on all ranks together."""
        train = self.config.train
        return train.batch_size * train.accum_freq * self.ranks.world_size

    def view(self) -> View:
        """The student as it is evaluated and exported; a collective under ZeRO."""
        weights = checkpoint.student_weights(self.engine)
        if self.pruning is None:
            return View(weights, self.student)
        return self.pruning.view(weights, self.pruning.target(self.state.step))

    def cut(self) -> None:
        """End the pruning: the student becomes what is left of it, with a new optimiser.

        The random states are those of before.
        """
        assert self.pruning is not None
        before = checkpoint.random_state()
        method = checkpoint.whole_weights(self.engine, self.engine.module.method)
        weights, spec = self.pruning.view(checkpoint.student_weights(self.engine))
        self.engine.destroy()
        # the old engine, which refers to itself, must not lie beside the new one
        self.engine, self.pruning, self.buffers = None, None, Buffers(torch.nn.Module())
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.student, self.state.is_cut = spec, True
        tower = build_from_spec(spec, grad_checkpointing=self.config.model.grad_checkpointing)
        tower.clip.load_state_dict(weights)
        engine_config = self.identity["engine"]
        student = assembly.Student(tower, spec)
        self.engine = build_engine(
            self.config,
            self.ranks,
            student,
            self.teachers,
            engine_config,
            method,
            centres=self.centres,
        )
        self.buffers = Buffers(self.engine.module)
        checkpoint.set_random_state(before)
        gone, asked = lacking(spec), self.config.prune.target
        self.log.note(
            f"cut after step {self.state.step}: {assembly.size(spec, tower)}; {gone:.2%} of the "
            f"original's block parameters are gone, {asked:.2%} were asked for"
        )
        if abs(gone - asked) > BUDGET_TOLERANCE:
            self.log.warn("the target is missed: heads of a small tower are a coarse measure")


def start_ranks(config: RunConfig) -> Ranks:
    """Join the process group: gloo on CPU, NCCL on GPU."""
    ranks.environment()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if ranks.on_gpu() else "cpu")
    import deepspeed

    # optional shared-memory collectives of CPU ranks; building them takes longer than they save
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=config.run.timeout_minutes)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"ranks: rank {os.environ['RANK']} cannot meet the others at {place} ({error}); where "
            "another run on this machine has the port, give deepspeed --master_port another"
        ) from error
    me = ranks.current()
    if me.device.type == "cuda":
        torch.cuda.set_device(me.device)
    else:
        ranks.share_cores()
    return me


def build(
    config: RunConfig,
    me: Ranks,
    stop: Stop,
    heartbeat: Heartbeat,
    cleanup: contextlib.ExitStack,
) -> Job:
    """Everything before the first step; what does not fit together is said here."""
    folder = Path(config.run.logs) / config.run.name
    resumed = checkpoint.starting_point(folder, config.run.resume, me)
    engine_config = deepspeed_config(config, me.world_size)
    student = None
    if resumed:
        checkpointing = config.model.grad_checkpointing
        student = checkpoint.saved_student(resumed, grad_checkpointing=checkpointing)
    is_cut = student is not None
    prompts = prompting.build(config, me) if config.method.on_classes else None
    student = student or (prompts.student if prompts else assembly.build_student(config))
    pruning = None
    if config.prune.target and not is_cut:
        pruning = Pruning(
            student, config.prune, group=me.group, device=me.device, seed=config.train.seed
        )
    teachers: Teachers | None
    clusters = centres = store = None
    if prompts:
        teachers, (loader, identity, data_rows) = prompts.teachers, prompts.data
        cleanup.callback(loader.close)
    else:
        store = assembly.open_cache(config, me)
        teachers = assembly.build_teachers(config, me, student.spec, store)
        clusters = clustering.open_clusters(config, me, teachers, store)
        loader, identity, data_rows = assembly.build_data(
            config, me, student.spec, teachers, store, clusters
        )
        cleanup.callback(loader.close)
        if clusters:
            centres = clustering.build_centres(config, me, student.spec, clusters)
    identity |= {"engine": engine_config, "teacher": teachers.checksum() if teachers else None}
    evaluator = build_evaluator(config, me, student.spec)
    total = assembly.num_steps(config, loader.steps_per_epoch)
    notes = checkpoint.check(resumed, config, me, identity) if resumed else []
    if config.prune.target and config.prune.steps >= total:
        raise ValueError(
            f"prune.steps: expected less than the {total} steps of the run, which trains on after "
            f"the cut; got {config.prune.steps}"
        )
    steps_per_epoch = loader.steps_per_epoch
    told = clustering.row(config, clusters, store) if clusters else ""
    rows = assembly.header(config, me, student, teachers, steps_per_epoch, total, told)
    tokens = prompts.class_tokens if prompts else None
    engine = build_engine(
        config, me, student, teachers, engine_config, class_tokens=tokens, centres=centres
    )
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.train.seed + me.rank)
    state = State()
    if resumed:
        kept: dict[str, Any] = {"loader": loader, "pruning": pruning, "centres": centres}
        state = checkpoint.load(engine, resumed, ranks=me, **kept)
    log = open_log(config, me, folder, state.step, total)
    cleanup.callback(log.close)
    log.header(f"kdengine {folder}", rows | data_rows)
    if resumed:
        log.note(f"resumed from {resumed}, at step {state.step}")
        if state.step >= total:
            log.warn(f"nothing left to train: the run ends at step {total}")
    elif config.run.resume:
        log.note(f"--run.resume latest: {folder} has no checkpoint, so this run starts anew")
    for note in notes + (checkpoint.clean(folder, state.step) if me.first else []):
        log.warn(note)
    parts = (log, student.spec, teachers, engine, loader, evaluator)
    counts = (identity, total, state, Buffers(engine.module), pruning, centres)
    return Job(config, me, stop, heartbeat, folder, *parts, *counts)


def open_log(config: RunConfig, me: Ranks, folder: Path, step: int, total: int) -> RunLog:
    """The run's log on rank 0, with a copy of the configuration beside it."""
    tensorboard = config.run.tensorboard
    log = RunLog(folder, enabled=me.first, step=step, total=total, tensorboard=tensorboard)
    if me.first:
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    if config.optim.warmup >= total:
        log.warn(f"the warm-up of {config.optim.warmup} steps is longer than the run of {total}")
    return log


def build_engine(
    config: RunConfig,
    me: Ranks,
    student: assembly.Student,
    teachers: Teachers | None,
    engine_config: dict[str, Any],
    method_weights: Mapping[str, Tensor] | None = None,
    class_tokens: Tensor | None = None,
    centres: Centres | None = None,
) -> Any:
    """The DeepSpeed engine around student, heads and scales; equal weights on all ranks.

    Heads and scales start from ``method_weights`` where they are given; ``class_tokens`` are for
    methods with prompts, ``centres`` for one of clusters, whose head may lead to their width.
    """
    import deepspeed

    torch.manual_seed(config.train.seed)
    method = build_method(
        config.method,
        student_width=student.spec.embed_dim,
        teacher_widths=[spec.embed_dim for spec in teachers.specs] if teachers else (),
        class_tokens=class_tokens,
        centre_width=centres.constant_width if centres else None,
        group=Exchange(
            me.group,
            num_chunks=config.train.num_chunks,
            regather=config.train.regather,
            per_node=me.per_node(),
        ),
    )
    if method_weights is not None:
        method.load_state_dict(method_weights)
    if config.train.torchcompile:
        student.tower.compile()
    root = build_root(student.tower, method).to(me.device)
    optimizer = build_optimizer(root, config.optim)
    engine, *_ = deepspeed.initialize(
        model=root, optimizer=optimizer, config=engine_config, dist_init_required=False
    )
    return engine


def check_selection(own: Eval, sets: Sequence[EvalSet]) -> None:
    """Refuse to select a student by what it is to be tested on.

    Raises:
        ValueError: the set does not exist, is none to validate on, or is never evaluated.
    """
    if not own.select:
        return
    name, _, metric = own.select.rpartition("/")
    found = next((one for one in sets if one.name == name), None)
    if found is None or not metric:
        names = ", ".join(one.name for one in sets) or "none"
        raise ValueError(
            f"eval.select: expected SET/METRIC with one of the sets evaluated ({names}), got "
            f"{own.select!r}"
        )
    if not (found.has_split and found.part == "val") and not own.select_on_test:
        raise ValueError(
            f"eval.select: {name} is a set to test on, and a student that is selected by it is not "
            "tested any more; select by a list val, as in --eval.zeroshot "
            "'NAME=SHARDS;SPLIT.json:val', or say --eval.select-on-test"
        )


def build_evaluator(config: RunConfig, me: Ranks, student: TowerSpec) -> Evaluator | None:
    """Open the evaluation sets, so that an error in them shows before the first step."""
    sets = parse_eval_sets(config.eval.retrieval, config.eval.zeroshot)
    check_selection(config.eval, sets)
    if not sets:
        return None
    return Evaluator(
        student,
        sets,
        batch_size=config.eval.batch_size,
        index_dir=config.data.index_dir,
        max_pixels=config.data.max_pixels,
        num_threads=config.data.workers,
        group=me.group,
        device=me.device,
        progress=True,
    )
