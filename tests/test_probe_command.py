# SPDX-License-Identifier: Apache-2.0
"""kdengine eval --probe on photos: in shards, in class folders, and without labels."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdengine import evaluate, models
from kdengine.cli import main
from kdengine.evaluate import probe
from kdengine.evaluate.probe import GRID


@pytest.fixture(scope="module")
def cifar(test_data: Path, tmp_path_factory) -> Path:
    """A student, and 800 photos of ten classes in two shards and in two trees of folders."""
    folder = tmp_path_factory.mktemp("cifar")
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    models.export_student(tower.state_dict(), spec, folder / "student")
    names = (test_data / "cifar10-classnames.txt").read_text().split()
    with tarfile.open(test_data / "cifar10-zeroshot.tar") as tar:
        data = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted(name.removesuffix(".cls") for name in data if name.endswith(".cls"))[:800]
    for part, chosen in (("train", keys[:600]), ("test", keys[600:])):
        # in the order of the folders, so that batches and held-out images are the same
        chosen.sort(key=lambda key: (int(data[f"{key}.cls"]), key))
        with tarfile.open(folder / f"{part}.tar", "w") as out:
            for key in chosen:
                for name in (f"{key}.jpg", f"{key}.cls"):
                    info = tarfile.TarInfo(name)
                    info.size = len(data[name])
                    out.addfile(info, io.BytesIO(data[name]))
                own = folder / part / names[int(data[f"{key}.cls"])]
                own.mkdir(parents=True, exist_ok=True)
                (own / f"{key}.jpg").write_bytes(data[f"{key}.jpg"])
    return folder


@pytest.fixture(scope="module")
def scored(cifar: Path) -> dict[str, float]:
    """What the command writes for the shards."""
    return command(cifar, f"c10={cifar}/train.tar;{cifar}/test.tar")


def command(folder: Path, word: str, *words: str) -> dict[str, float]:
    out = folder / "numbers.json"
    assert main(["eval", f"{folder}/student", "--probe", word, *words, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_random_student_does_better_than_chance_on_photos(scored) -> None:
    assert scored["c10/probe-classes"] == 10 and scored["c10/probe-C"] in GRID
    # 200 test images of ten classes: chance is 10 %, with a standard error of 2
    assert 0.18 < scored["c10/probe-top1"] < 0.7
    assert 0.18 < scored["c10/probe-mean-per-class-recall"] < 0.7


def test_the_command_probes_the_normalised_embeddings(cifar: Path, scored) -> None:
    tower, spec = models.load_model(f"{cifar}/student")
    sets = evaluate.parse_eval_sets([], [], [f"c10={cifar}/train.tar;{cifar}/test.tar"])
    runner = evaluate.Evaluator(spec, sets)
    x, label = [], []
    with torch.no_grad():
        for index in runner.indexes[0]:
            batches = list(runner._loader(index))
            image = torch.cat([batch["image"][batch["valid"]] for batch in batches])
            x.append(F.normalize(tower.eval().encode_image(image)).double().numpy())
            label.append(index.labels())
    direct = probe._solver(scored["c10/probe-C"])
    probe._fit(direct, x[0], label[0], None)
    accuracy = direct.score(x[1], label[1])
    assert scored["c10/probe-top1"] == accuracy


def test_class_folders_are_probed_like_shards(cifar: Path, scored, capsys) -> None:
    assert command(cifar, f"c10={cifar}/train;{cifar}/test") == scored
    printed = capsys.readouterr().out
    assert "probe-C" in printed and "probe-mean-per-class-recall" in printed


def test_shards_without_labels_are_an_error_of_their_set(cifar: Path, test_data: Path, capsys):
    word = f"c10={cifar}/train.tar;{test_data}/cocomini-by-000.tar"
    words = ["--index-dir", f"{cifar}/index"]
    assert main(["eval", f"{cifar}/student", "--probe", word, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: evaluation set c10: no good sample among 51")
    assert "label-missing" in error
