# SPDX-License-Identifier: Apache-2.0
"""Base to novel, averages over sets, sets with a split file, and what may select a student."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kdengine.config import Eval
from kdengine.evaluate import Evaluator, parse_eval_sets
from kdengine.evaluate.protocols import base_to_novel, harmonic_mean, mean_top1
from kdengine.evaluate.zeroshot import half_metrics, zeroshot_metrics
from kdengine.job import check_selection
from kdengine.models import Student, build_student

NAMES = ["cat", "dog", "polar bear", "x-ray fish", "crane"]


def test_published_harmonic_means() -> None:
    # PromptKD's average of 11 data sets, and ComKD-CLIP on SUN397
    assert harmonic_mean(86.96, 80.73) == pytest.approx(83.73, abs=0.006)
    assert harmonic_mean(84.19, 81.71) == pytest.approx(82.93, abs=0.006)
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_the_mean_over_sets_is_of_accuracies_and_not_of_harmonic_means() -> None:
    metrics = {"a/base-top1": 0.9, "a/novel-top1": 0.1, "b/base-top1": 0.5, "b/novel-top1": 0.7}
    found = base_to_novel({**metrics, "a/harmonic-mean": 0.18, "a/zeroshot-top1": 0.3})
    assert found["base-top1"] == pytest.approx(0.7) and found["novel-top1"] == pytest.approx(0.4)
    assert found["harmonic-mean"] == pytest.approx(2 * 0.7 * 0.4 / 1.1)
    mean_of_means = (harmonic_mean(0.9, 0.1) + harmonic_mean(0.5, 0.7)) / 2
    assert abs(found["harmonic-mean"] - mean_of_means) > 0.1
    with pytest.raises(ValueError, match="expected base-top1 of at least one set, got none"):
        base_to_novel({"a/zeroshot-top1": 0.3})


def test_the_source_is_no_part_of_the_mean_over_targets() -> None:
    metrics = {"imagenet/zeroshot-top1": 0.7, "v2/zeroshot-top1": 0.6, "a/zeroshot-top1": 0.4}
    assert mean_top1(metrics, "imagenet") == {"imagenet": 0.7, "mean": pytest.approx(0.5)}
    assert mean_top1(metrics, "other")["mean"] == pytest.approx(1.7 / 3)
    with pytest.raises(ValueError, match="at least one set"):
        mean_top1({"imagenet/zeroshot-top1": 0.7}, "imagenet")


def test_images_of_a_half_compete_among_its_classes_alone() -> None:
    image, classes = (F.normalize(torch.randn(n, 6), dim=1) for n in (40, 5))
    labels = torch.arange(40) % 5
    found = half_metrics(image, classes, labels)
    logits = image @ classes.T
    base, novel = labels < 3, labels >= 3
    expected = (logits[base][:, :3].argmax(1) == labels[base]).double().mean()
    assert found["base-top1"] == pytest.approx(float(expected))
    expected = (logits[novel][:, 3:].argmax(1) == labels[novel] - 3).double().mean()
    assert found["novel-top1"] == pytest.approx(float(expected))
    assert found["harmonic-mean"] == harmonic_mean(found["base-top1"], found["novel-top1"])
    assert half_metrics(image[base], classes, labels[base]) == {}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Class folders with a split file, whose numbers are not the order of the folders."""
    draw = np.random.default_rng(0)
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        for n in range(6):
            out = io.BytesIO()
            pixels = draw.integers(0, 99, (20, 20, 3)) + draw.integers(0, 150, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
            path = tmp_path / "set" / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(out.getvalue())
            parts[("train", "val", "test")[n % 3]].append([f"{name}/{n}.png", label, name])
    (tmp_path / "split.json").write_text(json.dumps(parts))
    return tmp_path


@pytest.fixture
def student(tmp_path: Path) -> Student:
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    return build_student(str(path), seed=0)


def test_a_split_file_says_which_images_are_evaluated_and_of_which_classes(
    data: Path, student: Student
) -> None:
    words = [f"{part}={data}/set;{data}/split.json:{part}" for part in ("val", "test")]
    sets = parse_eval_sets((), [*words, f"again={data}/set;{data}/split.json;a drawing of a {{}}"])
    evaluator = Evaluator(student.spec, sets, batch_size=4)
    found = evaluator.run(student.tower)
    assert found is not None
    for (index,), one in zip(evaluator.indexes, sets, strict=True):
        assert index.num_samples == 10
        expected = [n for n in range(6) if ("train", "val", "test")[n % 3] == one.part]
        assert sorted({int(key.split("/")[1][0]) for key in index.keys()}) == expected
        folders = [key.split("/")[0] for key in index.keys()]
        assert [NAMES[label] for label in index.labels()] == folders
    assert [one.read_templates() for one in sets] == [
        ["a photo of a {}."],
        ["a photo of a {}."],
        ["a drawing of a {}"],
    ]
    for name in ("val", "test", "again"):
        assert found[f"{name}/zeroshot-classes"] == 5
        top = [found[f"{name}/{metric}"] for metric in ("base-top1", "novel-top1")]
        assert found[f"{name}/harmonic-mean"] == pytest.approx(harmonic_mean(*top))
    # base and novel images together, were they told apart from the other half too
    shares = 0.6 * found["test/base-top1"] + 0.4 * found["test/novel-top1"]
    assert shares >= found["test/zeroshot-top1"] - 1e-9


def test_listed_images_that_are_not_there_are_told(
    data: Path, student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "set" / "dog" / "2.png").unlink()
    sets = parse_eval_sets((), [f"x={data}/set;{data}/split.json"])
    with caplog.at_level("WARNING"):
        evaluator = Evaluator(student.spec, sets, batch_size=4)
    assert evaluator.indexes[0][0].num_samples == 9
    assert "x: 1 listed images are not in the data" in caplog.text and "dog/2.png" in caplog.text


def test_a_split_without_the_list_is_refused(data: Path, student: Student) -> None:
    with pytest.raises(ValueError, match="has the lists train, val, test; 'valid' came"):
        parse_eval_sets((), [f"x={data}/set;{data}/split.json:valid"])
    (data / "other.json").write_text(json.dumps({"train": [], "val": [], "test": []}))
    with pytest.raises(ValueError, match="evaluation set x: split .*there is no image to train on"):
        parse_eval_sets((), [f"x={data}/set;{data}/other.json"])


def test_a_set_to_test_on_selects_no_student_unless_it_is_said(data: Path) -> None:
    words = (f"val={data}/set;{data}/split.json:val", f"test={data}/set;{data}/split.json")
    sets = parse_eval_sets((), words)

    def check(select: str, **options: Any) -> None:
        check_selection(Eval(select=select, **options), sets)

    check("")
    check("val/base-top1")
    check("test/base-top1", select_on_test=True)
    with pytest.raises(ValueError, match="test is a set to test on, and a student that is sel"):
        check("test/base-top1")
    for wrong in ("train/base-top1", "val", "val/"):
        with pytest.raises(ValueError, match=r"expected SET/METRIC with one of .*\(val, test\)"):
            check(wrong)


def test_top_one_of_all_classes_is_the_usual_one() -> None:
    image, classes = (F.normalize(torch.randn(n, 6), dim=1) for n in (40, 5))
    labels = torch.arange(40) % 5
    top = zeroshot_metrics(image, classes, labels)["zeroshot-top1"]
    expected = float(((image @ classes.T).argmax(1) == labels).double().mean())
    assert top == pytest.approx(expected)
