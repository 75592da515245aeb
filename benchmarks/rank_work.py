# SPDX-License-Identifier: Apache-2.0
"""What each rank of ``bench_distributed.py`` does: a loss counted, a loss timed, a share alone."""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import common, counting, peers, problems
from kdengine import distributed, losses, ops
from kdengine.distributed import Exchange

OBJECTIVES = ("InfoNCE", "InfoNCE+CRD")
COUNTED = (*OBJECTIVES, "CLIP-KD", "GD")
SCALE = 14.3


class Alone(Exchange):
    """A rank of W without the others: its own rows arrive in place of theirs."""

    def __init__(self, world_size: int, num_chunks: int | None = None) -> None:
        super().__init__(None, num_chunks=num_chunks)
        self.world_size = world_size

    def gather_numbers(
        self, numbers: Mapping[str, int], device: torch.device
    ) -> dict[str, list[int]]:
        """The others have as many rows."""
        return {name: [number] * self.world_size for name, number in numbers.items()}

    def _begin(
        self, what: str, collective: Callable, received: Tensor, sent: Tensor, **options: Any
    ) -> Callable[[], None]:
        # as much memory is written as by the real ones
        if len(received) > len(sent):
            received.view(self.world_size, -1).copy_(sent)
        else:
            received.copy_(sent)
        return lambda: None


def inputs_of(options: argparse.Namespace, objective: str, rows: int, rank: int) -> problems.Inputs:
    """A rank's features and the scale."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    problem = problems.Problem(objective, rows, options.width, SCALE, dtype)
    return problems.make_inputs(problem, device, seed=rank)


def gradients(value: Tensor, x: problems.Inputs) -> list[Tensor]:
    """Of image, text and scale."""
    return list(torch.autograd.grad(value, [x["image"], x["text"], x["scale"]]))


def open_clip(x: problems.Inputs, home: Any, objective: str, **setting: Any) -> list[Tensor]:
    """The objective by a drop-in of open_clip's losses, or by those themselves."""
    student = x["image"], x["text"], x["scale"]
    if objective == "InfoNCE":
        return gradients(home.ClipLoss(**setting)(*student), x)
    teacher = x["teacher_image"], x["teacher_text"], problems.TEACHER_SCALE
    return gradients(sum(home.DistillClipLoss(**setting)(*student, *teacher)), x)


def engine(x: problems.Inputs, objective: str, backend: str, exchange: Exchange) -> list[Tensor]:
    """The objective by ``similarity_loss``."""
    options = {"group": exchange, "backend": backend}
    return gradients(problems.engine_loss(losses, x, problems.OBJECTIVES[objective], **options), x)


def gradient_distillation(x: problems.Inputs, group: Any) -> list[Tensor]:
    """GD with a weight that makes its gradients a matter of normal numbers."""
    pair = x["teacher_image"], x["teacher_text"], problems.TEACHER_SCALE
    student = x["image"], x["text"], x["scale"]
    return gradients(1e4 * losses.gradient(*student, *pair, group=group), x)


def gathered(x: problems.Inputs) -> list[Tensor]:
    """GD of all rows on every rank."""
    world = dist.group.WORLD
    rows = {n: distributed.gather_rows(v, world) for n, v in x.items() if v.ndim}
    pair = rows["teacher_image"].detach(), rows["teacher_text"].detach(), problems.TEACHER_SCALE
    student = rows["image"], rows["text"], x["scale"]
    return gradients(1e4 * losses.gradient(*student, *pair), x)


def recipe(x: problems.Inputs, *, once: bool) -> list[Tensor]:
    """InfoNCE + CRD + ICL, with the teacher's texts on their way once, or for each loss."""
    exchange = Exchange(dist.group.WORLD)
    options = {"group": exchange, "backend": "auto"}
    with exchange.once(*[x["teacher_text"]] * once):
        loss = problems.engine_loss(losses, x, problems.OBJECTIVES["CLIP-KD"], **options)
        return gradients(loss, x)


def contenders(
    objective: str, x: problems.Inputs, setting: dict[str, Any]
) -> dict[str, Callable[[], list[Tensor]]]:
    """Ours, and what it is compared with."""
    if objective == "GD":
        work = functools.partial(gradient_distillation, x, dist.group.WORLD)
        return {"kdengine": work, "all rows on every rank": functools.partial(gathered, x)}
    if objective == "CLIP-KD":
        ways = {"kdengine": True, "each loss alone": False}
        return {name: functools.partial(recipe, x, once=once) for name, once in ways.items()}
    homes = {"kdengine": losses, "open_clip": peers.open_clip_losses()}
    return {
        name: functools.partial(open_clip, x, home, objective, **setting)
        for name, home in homes.items()
    }


def count(rank: int, world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes and FLOPs of this rank, ours and another's, objective by objective."""
    rows = []
    setting = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world_size}
    # small matrices would be kept; these stand for large ones, which are made again
    ops.set_workspace(1 << 20)
    for objective in COUNTED:
        like = "InfoNCE+CRD" if objective == "GD" else objective
        x = inputs_of(options, like, options.rows[0], rank)
        found = {}
        for backend, work in contenders(objective, x, setting).items():
            with counting.counting() as counts:
                found[backend] = work()
            # a rank's part of the scale's gradient may be that of its value, or another
            found[backend][2] = distributed.average(found[backend][2], dist.group.WORLD)
            unit = 2 * options.rows[0] ** 2 * world_size * options.width
            values = {"flops": counts.flops, "units": counts.flops / unit}
            values |= {"bytes": counts.bytes.total(), "by_collective": dict(counts.bytes)}
            rows.append({"objective": objective, "backend": backend, **values})
        ours, theirs = found.values()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
        for row in rows[-2:]:
            row["difference"] = max(errors)
    return rows


def expose(rank: int, world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of this rank's loss, with its communication and without."""
    device, rows = torch.device(options.device), []
    for objective in OBJECTIVES:
        for b in options.rows:
            x = inputs_of(options, objective, b, rank)
            for chunks in options.chunks:
                real = Exchange(dist.group.WORLD, num_chunks=chunks)
                works = [
                    functools.partial(engine, x, objective, options.backend, exchange)
                    for exchange in (real, Alone(world_size, chunks))
                ]
                # in turn, and as often on every rank
                num_runs = options.repeats + 2
                runs = [[common.time_ms(work, device) for work in works] for _ in range(num_runs)]
                times = [statistics.median(own) for own in zip(*runs[2:], strict=True)]
                rows.append(
                    {
                        "objective": objective,
                        "backend": "kdengine",
                        "rows": b,
                        "variant": variant(chunks),
                        "loss_ms": times[0],
                        "compute_ms": times[1],
                        "exposed_ms": times[0] - times[1],
                    }
                )
    return rows


def variant(chunks: int | None) -> str:
    return f"{chunks or 'default'} chunks"


def in_ranks(work: Callable, world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of rank 0, after all ranks have done the work."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            one_rank, (work, world_size, folder, options), nprocs=world_size
        )
        return json.loads(Path(folder, "rows").read_text())


def one_rank(
    rank: int, work: Callable, world_size: int, folder: str, options: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    rows = work(rank, world_size, options)
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
