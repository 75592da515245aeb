# SPDX-License-Identifier: Apache-2.0
"""Train a student, with or without a teacher.

    deepspeed kdengine/train.py --recipe NAME --section.key value ...     several ranks
    python kdengine/train.py --recipe NAME --section.key value ...        one process

Everything is written under LOGS/NAME: config.toml, metrics.jsonl, eval.jsonl, out.log,
tensorboard/, checkpoints/, and at the end export/, the student as open_clip loads it. The exit code
is 0 when done, and 75 when the run was asked to stop (SIGTERM, SIGINT, SIGUSR1, or the end of its
launcher) and has saved a checkpoint: the same command with --resume latest goes on from there.
"""

import os
import sys

if __name__ == "__main__":
    # started by path, python looks into this file's folder first, where data/ and others would
    # shadow packages of the same name; what must be found is the repository and the kernels
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(here)
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    sys.path[:0] = [root, os.path.join(root, "kernels")]

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdengine import arguments, assembly, checkpoint, ranks
from kdengine.checkpoint import State
from kdengine.config import RunConfig, to_toml
from kdengine.engineconfig import deepspeed_config
from kdengine.evaluate import Evaluator, parse_eval_sets
from kdengine.log import Meter, RunLog
from kdengine.methods import Distillation, build_method
from kdengine.models import Teacher, TowerSpec, build_from_spec
from kdengine.models.towers import LOG_SCALE_MAX
from kdengine.optimizer import Buffers, adamw, learning_rate, update
from kdengine.ranks import Heartbeat, Ranks
from kdengine.stop import EXIT_STOPPED, Stop


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
    teacher: Teacher | None
    engine: Any
    loader: Any
    evaluator: Evaluator | None
    num_samples: int
    total: int
    state: State
    buffers: Buffers


@dataclass
class Step:
    """The outcome of one step, the same on all ranks; terms are means over the ranks."""

    terms: dict[str, float]
    stop: bool
    save: bool
    lr: float
    grad_norm: float
    applied: bool
    data_wait_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    config = arguments.parse(sys.argv[1:] if argv is None else argv, description=__doc__ or "")
    with Stop() as stop, contextlib.ExitStack() as cleanup:
        me = start_ranks(config)
        heartbeat = Heartbeat(me)
        cleanup.callback(heartbeat.close)
        try:
            job = build(config, me, stop, heartbeat, cleanup)
            stop.ready()
            return train(job)
        except Exception as error:
            error.add_note(f"on rank {me.rank} of {me.world_size}; {heartbeat.report()}")
            raise


def start_ranks(config: RunConfig) -> Ranks:
    """Join the process group: gloo on CPU, NCCL on GPU."""
    ranks.environment()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if ranks.on_gpu() else "cpu")
    import deepspeed

    # optional shared-memory collectives of CPU ranks; building them takes longer than they save
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=config.run.timeout_minutes)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
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
    student, teacher = assembly.build_models(config, me)
    loader, num_samples, data_rows = assembly.build_data(
        config, me, student.spec, teacher.spec if teacher else None
    )
    cleanup.callback(loader.close)
    evaluator = build_evaluator(config, me, student.spec)
    total = assembly.num_steps(config, loader.steps_per_epoch)
    notes = checkpoint.check(resumed, config, me, num_samples) if resumed else []
    rows = assembly.header(config, me, student, teacher, loader.steps_per_epoch, total)
    engine = build_engine(config, me, student, teacher, engine_config)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.train.seed + me.rank)
    state = State()
    if resumed:
        state = checkpoint.load(engine, resumed, ranks=me, loader=loader)
    log = open_log(config, me, folder, state.step, total)
    cleanup.callback(log.close)
    log.header(f"kdengine {folder}", rows | data_rows)
    if resumed:
        log.note(f"resumed from {resumed}, at step {state.step}")
        if state.step >= total:
            log.warn(f"nothing left to train: the run ends at step {total}")
    elif config.run.resume:
        log.warn(f"--run.resume latest: {folder} has no checkpoint, so this run starts anew")
    for note in notes + (checkpoint.clean(folder, state.step) if me.first else []):
        log.warn(note)
    parts = (log, student.spec, teacher, engine, loader, evaluator)
    counts = (num_samples, total, state, Buffers(engine.module))
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
    teacher: Teacher | None,
    engine_config: dict[str, Any],
) -> Any:
    """The DeepSpeed engine around student, heads and scales; equal weights on all ranks."""
    import deepspeed

    torch.manual_seed(config.train.seed)
    method = build_method(
        config.method,
        student_width=student.spec.embed_dim,
        teacher_width=teacher.spec.embed_dim if teacher else None,
        group=me.group,
    )
    if config.train.torchcompile:
        student.tower.compile()
    root = Distillation(student.tower, method).to(me.device)
    optimizer = adamw(root, config.optim, me.device)
    engine, *_ = deepspeed.initialize(
        model=root, optimizer=optimizer, config=engine_config, dist_init_required=False
    )
    return engine


def train(job: Job) -> int:
    """The loop: evaluate, save, stop, step, log. Returns the exit code."""
    config, state, log = job.config, job.state, job.log
    stopping = save_asked = False
    saved_step, saved_at, started = state.step, time.monotonic(), time.monotonic()
    elapsed_before = state.elapsed_s
    meter = Meter()
    while True:
        aside = time.perf_counter()
        if evaluation_due(job) and not stopping:
            stopping = not evaluate(job)
        state.elapsed_s = elapsed_before + time.monotonic() - started
        last = state.step >= job.total
        if save_asked or stopping or last or save_due(job, saved_step):
            save(job)
            saved_step, saved_at = state.step, time.monotonic()
        if stopping:
            job.stop.request("another rank was asked to stop")
            log.warn(f"{job.stop.reason}: ended at step {state.step}; --resume latest goes on")
            return EXIT_STOPPED
        if last:
            break
        meter.leave_out(time.perf_counter() - aside)
        overdue = 0 < config.run.save_every_minutes * 60 < time.monotonic() - saved_at
        step = run_step(job, save=overdue and job.ranks.first)
        state.step += 1
        state.samples_seen += config.train.batch_size * job.ranks.world_size
        count_skipped(job, step)
        meter.add(step.data_wait_s)
        if state.step % config.run.log_every_n_steps == 0 or state.step == job.total:
            state.elapsed_s = elapsed_before + time.monotonic() - started
            record(job, step, meter)
        stopping, save_asked = step.stop, step.save
    if job.ranks.first:
        out = checkpoint.export_run(job.folder, job.folder / "export")
        log.note(f"done: {state.step} steps; the student is in {out}")
    job.ranks.barrier()
    return 0


def run_step(job: Job, *, save: bool) -> Step:
    """One batch through teacher and student, one update.

    Communication: beside the engine's own and the losses', one all-reduce of the loss terms, the
    request to stop and the request to save; its result is read after the update, so that it costs
    no wait of its own.
    """
    engine, device = job.engine, job.ranks.device
    # made before the forward pass is queued: a copy to the device waits for what is queued
    asked = torch.tensor([job.stop.reason is not None, save], dtype=torch.float32, device=device)
    job.heartbeat.at("loading data", job.state.step)
    start = time.perf_counter()
    batch = next(job.loader)
    data_wait_s = time.perf_counter() - start
    job.heartbeat.at("computing")
    teacher = None
    if job.teacher is not None:
        teacher = job.teacher(
            batch.get("teacher_image", batch["image"]), batch.get("teacher_tokens", batch["tokens"])
        )
    job.buffers.keep()
    loss, terms = engine(batch["image"], batch["tokens"], teacher)
    told = {"loss": loss.detach(), **terms}
    shared = job.ranks.sum(torch.cat([asked, torch.stack([x.float() for x in told.values()])]))
    # a loss that is not finite must not leave finite gradients: NaN spreads to the norm of all
    engine.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))
    job.heartbeat.at("updating")
    lr = learning_rate(job.state.step, job.total, job.config.optim)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    grad_norm, applied = update(engine)
    if not applied:
        job.buffers.restore()
    checkpoint.clamp_masters(engine, engine.module.log_scales(), 0.0, LOG_SCALE_MAX)
    stop, save_now, *sums = shared.tolist()
    return Step(
        terms={name: x / job.ranks.world_size for name, x in zip(told, sums, strict=True)},
        stop=stop > 0,
        save=save_now > 0,
        lr=lr,
        grad_norm=grad_norm,
        applied=applied,
        data_wait_s=data_wait_s,
    )


def count_skipped(job: Job, step: Step) -> None:
    """Count a step that was not taken; give up after too many in a row.

    Raises:
        RuntimeError: more than ``train.max_skipped`` consecutive steps were skipped.
    """
    state = job.state
    if step.applied:
        state.skipped_in_a_row = 0
        return
    state.num_skipped += 1
    state.skipped_in_a_row += 1
    told = ", ".join(f"{name} {value:.4g}" for name, value in step.terms.items())
    job.log.warn(f"step {state.step} skipped: loss or gradient is not finite ({told})")
    if state.skipped_in_a_row > job.config.train.max_skipped:
        raise RuntimeError(
            f"train: the loss or the gradient was not finite in {state.skipped_in_a_row} steps in "
            f"a row, up to step {state.step} ({told}); the weights are those of before: lower "
            "--optim.lr, set --optim.grad-clip-norm, or try --train.precision fp32"
        )


def record(job: Job, step: Step, meter: Meter) -> None:
    """Log one step; rates are means since the last logged one."""
    state, weights = job.state, job.engine.module.method.weights
    terms = {f"loss/{k}" if k in weights else k: v for k, v in step.terms.items()}
    values = {
        "step": state.step,
        "epoch": round(state.step / job.loader.steps_per_epoch, 4),
        "samples_seen": state.samples_seen,
        **terms,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        **meter.rates(job.config.train.batch_size * job.ranks.world_size),
        "num_skipped": state.num_skipped,
        "time_s": state.elapsed_s,
        "peak_memory_mib": ranks.peak_memory_mib(job.ranks.device),
    }
    job.log.step(values)


def build_evaluator(config: RunConfig, me: Ranks, student: TowerSpec) -> Evaluator | None:
    """Open the evaluation sets, so that an error in them shows before the first step."""
    sets = parse_eval_sets(config.eval.retrieval, config.eval.zeroshot)
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
    )


def evaluation_due(job: Job) -> bool:
    """Whether this step is to be evaluated and has not been."""
    step, every = job.state.step, job.config.eval.val_frequency
    if job.evaluator is None or step in (0, job.state.evaluated_step):
        return False
    return step == job.total or (every > 0 and step % every == 0)


def evaluate(job: Job) -> bool:
    """Evaluate the student on all ranks; False when the run was asked to stop meanwhile.

    The student is rebuilt from the fp32 masters, so what is measured is what an export holds.
    """
    assert job.evaluator is not None
    job.heartbeat.at("evaluating", job.state.step)
    start, before = time.perf_counter(), checkpoint.random_state()
    student = build_from_spec(job.student)
    student.clip.load_state_dict(checkpoint.student_weights(job.engine))
    results = job.evaluator.run(
        student.to(job.ranks.device),
        should_stop=lambda: job.ranks.any(job.stop.reason is not None),
    )
    checkpoint.set_random_state(before)
    if results is None:
        return False
    job.state.evaluated_step = job.state.step
    job.log.evaluation(job.state.step, results, time.perf_counter() - start)
    return True


def save_due(job: Job, saved_step: int) -> bool:
    """Whether the number of steps asks for a checkpoint."""
    every, step = job.config.run.save_every_n_steps, job.state.step
    return every > 0 and step % every == 0 and step != saved_step


def save(job: Job) -> None:
    """Write a checkpoint on all ranks."""
    job.heartbeat.at("saving", job.state.step)
    start = time.perf_counter()
    path = checkpoint.save(
        job.engine,
        job.folder,
        job.state,
        ranks=job.ranks,
        loader=job.loader,
        config=job.config,
        student=job.student,
        num_samples=job.num_samples,
    )
    job.log.note(f"saved {path} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    code = main()
    torch.distributed.destroy_process_group()
    sys.exit(code)
