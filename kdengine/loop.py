# SPDX-License-Identifier: Apache-2.0
"""The training loop: evaluate, save, stop, step, log."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kdengine import checkpoint, ranks
from kdengine.accumulate import Accumulation, Batch
from kdengine.centres import Centres, Drawn, read_assigned
from kdengine.job import Job
from kdengine.log import Meter
from kdengine.models import build_from_spec
from kdengine.models.towers import LOG_SCALE_MAX
from kdengine.optimizer import learning_rate, update
from kdengine.pruning import View
from kdengine.stop import EXIT_STOPPED


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


def train(job: Job) -> int:
    """The loop: evaluate, save, stop, step, log. Returns the exit code."""
    config, state, log = job.config, job.state, job.log
    stopping = save_asked = False
    saved_step, saved_at, started = state.step, time.monotonic(), time.monotonic()
    elapsed_before = state.elapsed_s
    meter = Meter()
    while True:
        aside = time.perf_counter()
        is_due = job.pruning is not None and state.step == config.prune.steps and not stopping
        if is_due:
            job.heartbeat.at("cutting the student", state.step)
            job.cut()
        if evaluation_due(job) and not stopping:
            stopping = not evaluate(job)
        state.elapsed_s = elapsed_before + time.monotonic() - started
        last = state.step >= job.total
        if is_due or save_asked or stopping or last or save_due(job, saved_step):
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
        number = state.step + 1
        logged = number % config.run.log_every_n_steps == 0 or number == job.total
        step = run_step(job, save=overdue and job.ranks.first, diagnose=logged)
        state.step += 1
        state.samples_seen += job.num_pairs
        count_skipped(job, step)
        meter.add(step.data_wait_s)
        if logged:
            state.elapsed_s = elapsed_before + time.monotonic() - started
            record(job, step, meter)
        stopping, save_asked = step.stop, step.save
    if job.ranks.first:
        out, which = job.folder / "export", "the student"
        if config.eval.select:
            which = f"the one with {config.eval.select} {state.best:.4f}"
        else:
            checkpoint.export_run(job.folder, out)
        log.note(f"done: {state.step} steps; {which} is in {out}")
    job.ranks.barrier()
    return 0


def run_step(job: Job, *, save: bool, diagnose: bool = False) -> Step:
    """The micro-batches of a step through teachers and student, one update.

    With ``diagnose`` the terms hold the likeness of student and teachers, of each rank's own batch.

    Communication: beside the engine's own and the losses', one all-reduce of the loss terms, the
    request to stop and the request to save; its result is read after the update, so that it costs
    no wait of its own.
    """
    engine, device = job.engine, job.ranks.device
    # made before the forward pass is queued: a copy to the device waits for what is queued
    asked = torch.tensor([job.stop.reason is not None, save], dtype=torch.float32, device=device)
    data_wait_s = 0.0

    def load() -> Batch:
        nonlocal data_wait_s
        job.heartbeat.at("loading data", job.state.step)
        start = time.perf_counter()
        batch = next(job.loader)
        data_wait_s += time.perf_counter() - start
        job.heartbeat.at("computing")
        return batch

    job.buffers.keep()
    if job.pruning is not None:
        job.pruning.begin(job.state.step)
    draw = None
    if job.centres is not None:
        draw = functools.partial(draw_centres, job.centres, job.state.step)
    passes = Accumulation(engine, job.teachers, job.config.train.accum_freq, draw)
    loss, terms = passes.forward(load, diagnose)
    told = {"loss": loss.detach(), **terms}
    shared = job.ranks.sum(torch.cat([asked, torch.stack([x.float() for x in told.values()])]))
    # a loss that is not finite must not leave finite gradients: NaN spreads to the norm of all
    passes.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))
    job.heartbeat.at("updating")
    lr = learning_rate(job.state.step, job.total, job.config.optim)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    grad_norm, applied = update(engine)
    if not applied:
        job.buffers.restore()
    if job.pruning is not None:
        job.pruning.finish(job.state.step, applied)
    if job.centres is not None:
        job.centres.finish(lr * job.config.method.clip_cid.centre_lr, applied)
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


def draw_centres(centres: Centres, step: int, told: Sequence[Batch]) -> Drawn:
    """The clusters of a step, from what is stored of its images."""
    return centres.draw(read_assigned(told, centres.targets), step)


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
    if job.pruning is not None:
        terms |= job.pruning.told(state.step)
    values = {
        "step": state.step,
        "epoch": round(state.step / job.loader.steps_per_epoch, 4),
        "samples_seen": state.samples_seen,
        **terms,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        **meter.rates(job.num_pairs),
        "num_skipped": state.num_skipped,
        "time_s": state.elapsed_s,
        "peak_memory_mib": ranks.peak_memory_mib(job.ranks.device),
    }
    job.log.step(values)


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
    job.log.pause()
    start, before = time.perf_counter(), checkpoint.random_state()
    view = job.view()
    student = build_from_spec(view.spec)
    student.clip.load_state_dict(view.weights)
    results = job.evaluator.run(
        student.to(job.ranks.device),
        should_stop=lambda: job.ranks.any(job.stop.reason is not None),
    )
    checkpoint.set_random_state(before)
    if results is None:
        return False
    job.state.evaluated_step = job.state.step
    job.log.evaluation(job.state.step, results, time.perf_counter() - start)
    # before its cut a student is larger than it was asked to be
    if job.config.eval.select and job.pruning is None:
        keep_best(job, results, view)
    return True


def keep_best(job: Job, results: Mapping[str, float], view: View) -> None:
    """Export the student where the metric of ``eval.select`` is the highest so far."""
    own, state = job.config.eval.select, job.state
    if own not in results:
        raise ValueError(
            f"eval.select: there is no metric {own}; expected one of {', '.join(sorted(results))}"
        )
    if state.best is not None and results[own] <= state.best:
        return
    state.best = results[own]
    if job.ranks.first:
        out = job.folder / "export"
        checkpoint.export_weights(view.weights, view.spec, out, job.folder, state)
        job.log.note(f"{own} {state.best:.4f} at step {state.step}: exported to {out}")


def save_due(job: Job, saved_step: int) -> bool:
    """Whether the number of steps asks for a checkpoint."""
    every, step = job.config.run.save_every_n_steps, job.state.step
    return every > 0 and step % every == 0 and step != saved_step


def save(job: Job) -> None:
    """Write a checkpoint on all ranks."""
    job.heartbeat.at("saving", job.state.step)
    start = time.perf_counter()
    view = job.view()
    path = checkpoint.save(
        job.engine,
        job.folder,
        job.state,
        ranks=job.ranks,
        loader=job.loader,
        config=job.config,
        weights=view.weights,
        student=view.spec,
        identity=job.identity,
        masks=None if job.pruning is None else job.pruning.state_dict(),
        centres=None if job.centres is None else job.centres.state_dict(),
    )
    if path is not None:
        job.log.note(f"saved {path} in {time.perf_counter() - start:.1f} s")
