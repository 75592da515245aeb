# SPDX-License-Identifier: Apache-2.0
"""Training on photos and hostile shards together: to the end, on the good samples alone."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

PHOTOS, NUM_PHOTOS = "flickr8k-train-000.tar", 500
STEPS = 20

# trains, and writes down where every image of every batch was read from
WATCHED = """
import json, os, sys
from kdengine.data.dali import ImagePipeline
from kdengine.train import main
run, sources = ImagePipeline.run, []
def watched(self):
    raw = run(self)
    sources.extend(raw.sources)
    return raw
ImagePipeline.run = watched
code = main(sys.argv[2:])
with open(sys.argv[1] + os.environ["RANK"], "w") as out:
    json.dump(sources, out)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def table(repository: Path) -> ModuleType:
    """What is to become of every hostile sample: the tables of the index's tests."""
    spec = importlib.util.spec_from_file_location("table", repository / "tests/test_index.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept(table: ModuleType) -> dict[str, int]:
    """The number of good samples of every shard that has some."""
    hostile = {name: fates.get(table.KEPT, 0) for name, (_, fates) in table.ARCHIVES.items()}
    return {PHOTOS: NUM_PHOTOS} | {name: number for name, number in hostile.items() if number}


@pytest.fixture(scope="module")
def trained(
    repository: Path,
    tiny: Path,
    test_data: Path,
    table: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run of two ranks over somewhat more than an epoch of all shards."""
    folder = tmp_path_factory.mktemp("hostile")
    shards = "::".join(str(test_data / name) for name in (PHOTOS, *table.ARCHIVES))
    line = ["--model.model", str(tiny), "--method.name", "clip", "--data.train-data", shards]
    line += ["--data.index-dir", str(folder / "index"), "--data.workers", "1"]
    line += ["--train.batch-size", "16", "--train.steps", str(STEPS), "--optim.warmup", "2"]
    line += ["--run.logs", str(folder), "--run.name", "a", "--run.log-every-n-steps", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "kernels")]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WATCHED,
                str(folder / "sources-"),
                "--run.no-tensorboard",
                *line,
            ],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
    return folder


@pytest.fixture(scope="module")
def places(trained: Path) -> dict[str, set[int]]:
    """Where in each shard images were read."""
    found: dict[str, set[int]] = {}
    for rank in range(2):
        for source in json.loads((trained / f"sources-{rank}").read_text()):
            tar, offset, _ = source.rsplit(":", 2)
            found.setdefault(Path(tar).name, set()).add(int(offset))
    return found


def test_training_among_bad_samples_skips_no_step(trained, records) -> None:
    found = records(trained / "a")
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert all(r["loss"] is not None for r in found)
    assert found[-1]["num_skipped"] == 0 and found[-1]["epoch"] > 1


def test_kept_and_quarantined_samples_are_reported_and_are_all(trained, table, kept) -> None:
    log = (trained / "a" / "out.log").read_text()
    found = r" samples: (\d+) in (\d+) shards, of (\d+) listed: the others hold no good sample$"
    (samples,) = re.findall(found, log, re.MULTILINE)
    ((bad, listed),) = re.findall(r" quarantined: (\d+), listed in (.*)$", log, re.MULTILINE)
    assert tuple(map(int, samples)) == (sum(kept.values()), len(kept), 1 + len(table.ARCHIVES))
    assert int(samples[0]) + int(bad) == NUM_PHOTOS + table.NUM_SAMPLES
    records = [json.loads(line) for line in Path(listed).read_text("utf-8").splitlines()]
    causes = Counter(record["cause"] for record in records if record["key"] is not None)
    fates = Counter[str]()
    for _, some in table.ARCHIVES.values():
        fates.update(some)
    del fates[table.KEPT]
    assert causes == fates and causes.total() == int(bad)


def test_every_shard_with_good_samples_is_read_and_no_other(places, kept) -> None:
    assert places.keys() == kept.keys()
    assert all(len(found) <= kept[name] for name, found in places.items())


def test_no_batch_holds_a_quarantined_sample(places, kept, table, test_data) -> None:
    with tarfile.open(test_data / "hostile-000.tar") as tar:
        keys = {member.offset_data: member.name.split(".")[0] for member in tar}
    read = {keys[place] for place in places["hostile-000.tar"]}
    assert {table.SAMPLES[key] for key in read} == {table.KEPT}
    assert len(read) > kept["hostile-000.tar"] / 2
