# SPDX-License-Identifier: Apache-2.0
"""A run with masks, its cut, and being stopped before, at and after it."""

from typing import Any

from kdengine.models import load_model
from kdengine.pruning import lacking

CUT, STEPS = 4, 7
# ZeRO stage, precision, micro-batches; steps at which a run is stopped
MODES, STOPS = [(0, "fp32", 1), (1, "amp_bf16", 2), (2, "bf16", 1)], (2, CUT, 5)


def test_a_pruned_run_is_the_same_wherever_it_was_stopped(
    run_ranks, stopped_and_resumed, words, records, tmp_path
) -> None:
    lines, wanted = [], []
    for stage, precision, accum_freq in MODES:
        fields: dict[str, Any] = {
            "prune__target": 0.5,
            "prune__steps": CUT,
            "prune__warmup": 2,
            "prune__mask_lr": 0.5,
            "train__steps": STEPS,
            "train__zero_stage": stage,
            "train__precision": precision,
            "train__accum_freq": accum_freq,
            "train__batch_size": 16 // accum_freq,
        }
        for stop in (0, *STOPS):
            line = words(f"{stage}-{stop}", **fields)
            # recomputed activations give the same numbers
            lines.append(([*line, "--model.grad-checkpointing"] if stage == 2 else line, stop))
            wanted.append((75, 0) if stop else (0, 0))
    assert run_ranks(stopped_and_resumed, 2, lines, timeout=500) == [wanted] * 2
    for stage, _, _ in MODES:
        whole = records(tmp_path / "runs" / f"{stage}-0")
        assert [r["step"] for r in whole] == list(range(1, STEPS + 1))
        assert ["sparsity" in r for r in whole] == [True] * CUT + [False] * (STEPS - CUT)
        assert whole[CUT - 1]["sparsity_target"] == 0.5
        for stop in STOPS:
            part = records(tmp_path / "runs" / f"{stage}-{stop}")
            for name in ("loss", "grad_norm", "lr", "samples_seen", "sparsity"):
                mode = (stage, stop, name)
                assert [r.get(name) for r in part] == [r.get(name) for r in whole], mode
        student = load_model(tmp_path / "runs" / f"{stage}-0" / "export")
        # a head is 1.4 % of these small towers
        assert abs(lacking(student.spec) - 0.5) < 0.01


def test_what_cannot_be_pruned_is_refused(train_here, words) -> None:
    pruned = {"prune__target": 0.5, "prune__warmup": 1}
    told = train_here(
        words("late", **pruned, prune__steps=6, train__steps=6),
        words("resnet", **pruned, prune__steps=2, model__model="RN-Femto-64"),
    )
    assert "expected less than the 6 steps of the run" in told[0][1]
    assert "prune.target: RN-Femto-64 cannot be pruned" in told[1][1]
