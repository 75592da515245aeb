# SPDX-License-Identifier: Apache-2.0
"""From a cache to clusters and a balanced part of the data, to a run that learns from both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdengine.centres import fresh_rows

# more clusters than a step can name
CLUSTERS, TOP = 60, 2
STEPS, STOP = 4, 2
TERMS = {"loss/task", "loss/instance", "loss/cluster", "loss/cluster_kl"}
# runs 'kdengine' with each list of words in one process
SEVERAL = """
import json, sys
from kdengine.cli import main
for words in json.loads(sys.argv[1]):
    print("CODE", main(words))
"""


@pytest.fixture(scope="session")
def made(caches: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clusters of the tiny shards, clusters without targets, and the part that balance keeps."""
    root, cache = tmp_path_factory.mktemp("made"), str(caches["fp32"])
    found = {name: root / name for name in ("clusters", "labels", "balanced")}
    k = ["--k", str(CLUSTERS)]
    lines = [
        ["cluster", cache, str(found["clusters"]), *k, "--top", str(TOP), "--scale", "30"],
        ["cluster", cache, str(found["labels"]), *k, "--top", "0"],
        ["balance", cache, str(found["balanced"]), "--retention", "0.7"],
    ]
    done = run(["-c", SEVERAL, json.dumps(lines)])
    assert done.stdout.count("CODE 0") == 3, done.stdout + done.stderr
    return found


@pytest.fixture
def cid(caches: Any, made: dict[str, Path], words: Any) -> Any:
    """``cid(name, **fields)``: words of a run from the cache with its clusters."""

    def build(name: str, **fields: Any) -> list[str]:
        values = {
            "method__name": "clip_cid",
            "method__clip_cid__clusters": made["clusters"],
            "distill__cache": caches["fp32"],
            "train__steps": STEPS,
            "train__batch_size": 8,
        }
        return words(name, **values | fields)

    return build


MODES: dict[str, dict[str, Any]] = {
    "own": {"train__zero_stage": 2, "method__clip_cid__sample_ratio": 0.4, "train__accum_freq": 2},
    "teacher": {
        "train__zero_stage": 0,
        "train__precision": "amp_bf16",
        "method__clip_cid__prototypes": "teacher",
        "method__clip_cid__targets": "teacher",
        "method__clip_cid__sample_ratio": 0.4,
    },
    "many": {
        "train__zero_stage": 3,
        "train__precision": "bf16",
        "method__clip_cid__positives": 2,
    },
}


def test_a_stopped_run_goes_on_with_its_centres(
    run_ranks: Any, stopped_and_resumed: Any, cid: Any, made: Any, records: Any, tmp_path: Path
) -> None:
    """The same losses, bit by bit, and the same centres, a part on each rank."""
    lines, wanted = [], []
    for mode, fields in MODES.items():
        # what stays constant has nothing to go on with
        for stop in (0, STOP) if mode != "teacher" else (0,):
            fields = fields | {"data__keep": made["balanced"]} if mode == "own" else fields
            lines.append((cid(f"{mode}-{stop}", **fields), stop))
            wanted.append((75, 0) if stop else (0, 0))
    assert run_ranks(stopped_and_resumed, 2, lines, timeout=500) == [wanted] * 2
    for mode in MODES:
        folder = tmp_path / "runs" / f"{mode}-0"
        whole = records(folder)
        assert [r["step"] for r in whole] == list(range(1, STEPS + 1))
        assert set(whole[0]) > {*TERMS, "cluster_scale"}
        assert len({r["loss/cluster"] for r in whole}) == STEPS
        names = [f"checkpoints/step_{STEPS:08d}/centres_{n:05d}.safetensors" for n in range(2)]
        if mode == "teacher":
            assert not any((folder / name).exists() for name in names)
            continue
        resumed = tmp_path / "runs" / f"{mode}-{STOP}"
        for name in ("loss", *TERMS, "grad_norm", "samples_seen"):
            assert [r[name] for r in records(resumed)] == [r[name] for r in whole], (mode, name)
        sizes = []
        for name in names:
            one, two = load_file(folder / name), load_file(resumed / name)
            assert all(torch.equal(one[x], two[x]) for x in one)
            # of a sample some rows were left out of some steps
            assert (one["steps"].min() < STEPS) == (mode == "own")
            assert one["steps"].max() > STEPS // 2
            sizes.append(len(one["centres"]))
        assert sizes == [CLUSTERS // 2] * 2


def test_live_teacher_and_loss_of_clusters_alone(
    cid: Any, train_here: Any, records: Any, teacher: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    only = {"method__clip_cid__task": 0, "method__clip_cid__instance": 0}
    only["distill__cache"] = "None"
    live = {"distill__cache": "None", "distill__distill_model": f"local-dir:{teacher}"}
    told = train_here(
        cid("alone", **only, method__clip_cid__cluster_kl=0, train__steps=40, optim__lr=3e-3),
        cid("live", **live, train__steps=2),
        cid("still", train__steps=1, method__clip_cid__centre_lr=1e-12),
        cid("without", method__clip_cid__cluster=0, method__clip_cid__cluster_kl=0, train__steps=2),
    )
    assert [code for code, _ in told] == [0] * 4, told
    step = "checkpoints/step_00000001/centres_00000.safetensors"
    still = load_file(tmp_path / "runs" / "still" / step)
    # neither more nor less than the learning rate times its multiple
    torch.testing.assert_close(still["centres"], fresh_rows(0, CLUSTERS, 32, 0), rtol=0, atol=1e-9)
    assert still["steps"].tolist() == [1] * CLUSTERS
    alone = records(tmp_path / "runs" / "alone")
    # clusters of images that were seen ten times over are learned
    first, last = (sum(r["loss"] for r in part) for part in (alone[:5], alone[-5:]))
    assert last < 0.7 * first
    assert set(records(tmp_path / "runs" / "live")[0]) > TERMS
    assert "loss/cluster" not in records(tmp_path / "runs" / "without")[0]


def test_clusters_that_do_not_fit_are_refused(
    cid: Any, train_here: Any, made: dict[str, Path], teacher: Path, shards: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    live = {"distill__cache": "None", "distill__distill_model": f"local-dir:{teacher}"}
    refused = {
        "no clusters": ({"method__clip_cid__clusters": tmp_path / "empty"}, "has no manifest.json"),
        "no targets": ({"method__clip_cid__clusters": made["labels"]}, "--top above 0"),
        "top": ({"method__clip_cid__top": 3}, "clip_cid.top: expected at most the 2 nearest"),
        "balanced": (
            {"distill__cache": made["balanced"]},
            "that of a result of 'kdengine balance'",
        ),
        "clustered": ({"data__keep": made["clusters"]}, "holds clusters; expected the folder"),
        "positives": ({"method__clip_cid__positives": 5}, "at most the 2 nearest clusters"),
        "width": (live | {"method__clip_cid__targets": "teacher"}, "of the widths [64, 64]"),
        "synthetic": (
            live | {"data__dataset_type": "synthetic", "data__train_num_samples": 64},
            "synthetic data is in no clusters",
        ),
        "other data": (
            live | {"data__train_data": shards.replace("00000..00001", "00000..00000")},
            "",
        ),
    }
    lines = [cid(f"refused-{n}", **fields) for n, (fields, _) in enumerate(refused.values())]
    at = list(refused).index("width")
    lines[at] += ["--distill.distill-model", *[f"local-dir:{teacher}"] * 2]
    for (name, (_, message)), (code, error) in zip(
        refused.items(), train_here(*lines), strict=True
    ):
        if message:
            assert code is None and message in error, (name, error)
        else:
            # some of the shards are enough
            assert code == 0, error
