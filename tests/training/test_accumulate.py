# SPDX-License-Identifier: Apache-2.0
"""Micro-batches in the real engine: one step, whatever their number, the ranks, the ZeRO stage."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdengine.report.runs import num_ranks, read_run

GLOBAL, STEPS = 32, 5
ALL = [(0, 1), (0, 8), *((stage, freq) for stage in (1, 2, 3) for freq in (1, 2, 8))]
FEWER = [(0, 1), (1, 8), (2, 2), (3, 8)]
TERMS = {"fd": 1.0, "gd": 10.0, "afd": 0.5}


@pytest.fixture
def teacher(tiny: Path, tmp_path: Path) -> str:
    """An exported model of another width."""
    from kdengine import models

    config = tmp_path / "teacher.json"
    config.write_text(json.dumps(json.loads(tiny.read_text()) | {"embed_dim": 48}))
    tower, spec = models.build_student(str(config), seed=1)
    models.export_student(tower.state_dict(), spec, tmp_path / "teacher")
    return f"local-dir:{tmp_path / 'teacher'}"


@pytest.fixture
def distilled(words: Any, teacher: str) -> Any:
    """``distilled(name, ...)``: the command line of a run with all terms of CLIP-KD."""

    def build(name: str, **fields: Any) -> list[str]:
        terms = {f"method__clip_kd__{term}": weight for term, weight in TERMS.items()}
        options = {"method__name": "clip_kd", "distill__distill_model": teacher, **terms}
        data = {"data__dataset_type": "synthetic", "data__train_num_samples": 64}
        return words(name, **{**options, **data, **fields})

    return build


@contextlib.contextmanager
def built(rank: int, world_size: int, line: list[str], optimizer: Any = None) -> Iterator[Any]:
    """The job of a command line, before its first step; another optimizer than AdamW if asked."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from kdengine import arguments, job
    from kdengine.ranks import Heartbeat
    from kdengine.stop import Stop

    config, usual = arguments.parse(line), job.build_optimizer
    with contextlib.ExitStack() as cleanup:
        me = job.start_ranks(config)
        cleanup.callback(setattr, job, "build_optimizer", usual)
        if optimizer is not None:
            job.build_optimizer = optimizer
        heartbeat = Heartbeat(me)
        cleanup.callback(heartbeat.close)
        yield job.build(config, me, Stop(), heartbeat, cleanup)


def parts(rank: int, world_size: int, freq: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of the same ``STEPS`` global batches, whoever asks."""
    draw = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        image = torch.randn(GLOBAL, 3, 32, 32, generator=draw)
        tokens = torch.randint(1, 49000, (GLOBAL, 16), generator=draw)
        tokens[:, -1] = 49407
        size = GLOBAL // world_size // freq
        for part in range(freq):
            rows = slice((rank * freq + part) * size, (rank * freq + part + 1) * size)
            yield {"image": image[rows], "tokens": tokens[rows]}


def sgd(module: torch.nn.Module, optim: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=optim.lr)


def agreement(
    rank: int, world_size: int, lines: dict[Any, list[str]], steps: int = STEPS
) -> dict[Any, Any]:
    """Of each run the losses, the gradients of the first step, and the weights after the last.

    A run whose key ends in "sgd" takes that optimizer, and two steps.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from kdengine import loop

    update, told = loop.update, {}
    for key, line in lines.items():
        gradients: dict[str, Tensor] = {}

        def noting(engine: Any, seen: dict[str, Tensor] = gradients) -> tuple[float, bool]:
            if not seen:
                for name, parameter in engine.module.named_parameters():
                    found = safe_get_full_grad(parameter)
                    seen[name] = torch.zeros(()) if found is None else found.float().clone()
            return update(engine)

        loop.update = noting
        plain = key[-1] == "sgd"
        with built(rank, world_size, line, sgd if plain else None) as job:
            job.loader = parts(rank, world_size, job.config.train.accum_freq)
            losses = []
            for _ in range(2 if plain else steps):
                losses.append(loop.run_step(job, save=False).terms)
                job.state.step += 1
            weights = {}
            for name, parameter in job.engine.module.named_parameters():
                zero = job.config.train.zero_stage
                master = safe_get_full_fp32_param(parameter) if zero else None
                weights[name] = (parameter if master is None else master).detach().float().clone()
        told[key] = losses, gradients, weights
    loop.update = update
    return told


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of what is not zero."""
    return (found - expected).norm().item() / max(expected.norm().item(), 1e-2)


def test_losses_gradients_and_weights_do_not_depend_on_the_split(run_ranks, distilled) -> None:
    found = {}
    for world_size in (1, 2):
        lines = {
            (stage, freq, optimizer): distilled(
                f"{world_size}-{stage}-{freq}-{optimizer}",
                train__zero_stage=stage,
                train__batch_size=GLOBAL // world_size // freq,
                train__accum_freq=freq,
            )
            for optimizer, cases in (("adamw", ALL), ("sgd", FEWER))
            for stage, freq in cases
        }
        for told in run_ranks(agreement, world_size, lines, timeout=400):
            found |= {(world_size, *key): value for key, value in told.items()}
    for optimizer in ("adamw", "sgd"):
        terms, gradients, weights = found[1, 0, 1, optimizer]
        assert abs(terms[1]["loss"] - terms[0]["loss"]) > 1e-3 * terms[0]["loss"]
        for (*key, kind), (others, slopes, ends) in found.items():
            if kind != optimizer:
                continue
            for one, other in zip(terms, others, strict=True):
                assert other == pytest.approx(one, rel=1e-5), key
            for name, expected in gradients.items():
                assert distance(slopes[name].view_as(expected), expected) < 1e-5, (key, name)
            if optimizer == "sgd":
                for name, expected in weights.items():
                    difference = (ends[name].view_as(expected) - expected).abs().max()
                    assert difference <= 1e-6, (key, name)


def together(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_low_precisions_are_as_exact_in_parts_as_whole(run_ranks, distilled) -> None:
    runs = [("fp32", 0, 1)]
    for precision in ("amp_bf16", "bf16"):
        runs += [(precision, 0, 1), *((precision, stage, 4) for stage in range(4))]
    lines = {
        (precision, stage, freq): distilled(
            f"{precision}-{stage}-{freq}",
            train__zero_stage=stage,
            train__precision=precision,
            train__batch_size=GLOBAL // freq,
            train__accum_freq=freq,
            distill__distill_precision="fp32",
        )
        for precision, stage, freq in runs
    }
    (told,) = run_ranks(agreement, 1, lines, 1, timeout=240)
    (terms,), exact, _ = told["fp32", 0, 1]
    error = {
        key: distance(together(gradients), together(exact))
        for key, (_, gradients, _) in told.items()
    }
    for (precision, stage, freq), ((others,), _, _) in told.items():
        assert others["loss"] == pytest.approx(terms["loss"], rel=1e-2), (precision, stage, freq)
        limit = 1.3 * error[precision, 0, 1]
        assert error[precision, stage, freq] <= limit < 0.2, error


def poisoned(rank: int, world_size: int, lines: list[list[str]]) -> list[Any]:
    """A good step, one whose first micro-batch holds a NaN on rank 1, another good one.

    Returns of each line whether the steps were taken, and what was counted in batch norms.
    """
    from kdengine.loop import run_step

    told = []
    for line in lines:
        with built(rank, world_size, line) as job:
            norms = [m for m in job.engine.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            batches, seen = iter(job.loader), []
            for bad in (False, True, False):
                pair = [next(batches) for _ in range(job.config.train.accum_freq)]
                if bad and rank == 1:
                    pair[0]["image"][0] = math.nan
                job.loader = iter(pair)
                applied = run_step(job, save=False).applied
                finite = all(x.isfinite().all() for n in norms for x in n.buffers())
                seen.append((applied, finite, {n.num_batches_tracked.item() for n in norms}))
            told.append(seen)
    return told


def test_a_bad_micro_batch_skips_the_step_and_its_statistics(run_ranks, words, tmp_path) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    }
    model = tmp_path / "resnet.json"
    model.write_text(json.dumps(config))
    modes = [(1, "fp32"), (3, "amp_bf16")]
    options = {"train__accum_freq": 2, "train__batch_size": 8}
    lines = [
        words(f"{z}{p}", model__model=model, train__zero_stage=z, train__precision=p, **options)
        for z, p in modes
    ]
    expected = [(True, True, {2}), (False, True, {2}), (True, True, {4})]
    assert run_ranks(poisoned, 2, lines, timeout=240) == [[expected] * len(lines)] * 2


def test_all_counts_are_of_whole_steps(train_here, words, records, tmp_path) -> None:
    options = {"train__accum_freq": 3, "train__batch_size": 10, "run__log_every_n_steps": 1}
    line = words("a", **options)
    at = line.index("--train.steps")
    line[at : at + 2] = ["--train.epochs", "2"]
    too_many = words("b", **options | {"train__accum_freq": 10})
    told = train_here(line, too_many)
    assert told[0][0] == 0, told
    # 96 samples fill three steps of 30, and no part of a fourth
    found = records(tmp_path / "runs" / "a")
    assert [r["step"] for r in found] == list(range(1, 7))
    assert [r["samples_seen"] for r in found] == [30, 60, 90, 120, 150, 180]
    assert [r["epoch"] for r in found] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], 1e-3)
    out = (tmp_path / "runs" / "a" / "out.log").read_text()
    assert "30 on a rank in 3 micro-batches, 30 in all" in out and "6, 3 an epoch" in out
    assert num_ranks(read_run(tmp_path / "runs" / "a")) == 1
    assert told[1][0] is None and "lower --train.batch-size or --train.accum-freq" in told[1][1]
