# SPDX-License-Identifier: Apache-2.0
"""kdengine eval --folder on photos in CLIP_benchmark's layout: scores, JSON files, broken sets."""

import errno
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kdengine import models
from kdengine.cli import main
from kdengine.evaluate import find_sets, suite
from kdengine.evaluate.evaluator import Evaluator
from kdengine.evaluate.layout import LocalSet
from kdengine.evaluate.scores import FittingTable, Scores, _plain, scores_table

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Samples = list[tuple[bytes, int]]


def write_part(part: Path, shards: list[Samples], image: str = "jpg") -> None:
    """One part of a set, as webdataset's writer makes it: PAX headers, times with a fraction."""
    part.mkdir(parents=True)
    for number, samples in enumerate(shards):
        with tarfile.open(part / f"{number}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for place, (data, label) in enumerate(samples):
                for name, content in ((image, data), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"s{place:07d}.{name}")
                    info.size, info.mtime = len(content), 1700000000.25
                    tar.addfile(info, io.BytesIO(content))
    (part / "nshards.txt").write_text(f"{len(shards)}\n")


def write_words(folder: Path, names: list[str]) -> None:
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    prompts = "a photo of a {c}.\na blurry photo of the {c}.\n"
    (folder / "zeroshot_classification_templates.txt").write_text(prompts)


def webp(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def limited(samples: Samples, most: dict[int, int]) -> Samples:
    """The first samples of each class, so many."""
    left, kept = dict(most), []
    for data, label in samples:
        if left.get(label, 0):
            left[label] -= 1
            kept.append((data, label))
    return kept


@dataclass
class Ran:
    """What one call left behind."""

    root: Path
    student: str
    code: int
    printed: str
    told: str
    numbers: dict[str, float]
    files: dict[str, dict]


@pytest.fixture(scope="module")
def photos(test_data: Path) -> Samples:
    """The photos of CIFAR-10 and their classes."""
    with tarfile.open(test_data / "cifar10-zeroshot.tar") as tar:
        data = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted(name.removesuffix(".cls") for name in data if name.endswith(".cls"))
    return [(data[f"{key}.jpg"], int(data[f"{key}.cls"])) for key in keys]


@pytest.fixture(scope="module")
def folder(photos: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole sets under the three spellings of a name, and broken ones between them."""
    root = tmp_path_factory.mktemp("sets")
    test, train = photos[:150], photos[150:500]
    whole = root / "wds_vtab-cifar10"
    write_part(whole / "test", [test[:80], test[80:]])
    write_part(whole / "train", [train])
    write_words(whole, NAMES)
    # classes of uneven size, so that the mean over classes is another number than acc1
    uneven = limited(photos, {label: 3 * label + 1 for label in range(10)})
    write_part(root / "wds_fgvc_aircraft_test" / "test", [[*uneven, (b"<html>", 0)]])
    write_words(root / "wds_fgvc_aircraft_test", NAMES)
    few = root / "wds" / "own" / "few"
    write_part(
        few / "test", [[(webp(data), label) for data, label in test if label < 3]], image="webp"
    )
    write_part(few / "train", [[(data, label) for data, label in train if label < 3]])
    write_words(few, NAMES[:3])
    write_part(root / "nameless" / "test", [test[:40]])
    write_part(root / "nameless" / "train", [train[:100]])
    write_part(root / "short" / "test", [test[:20]])
    (root / "short" / "test" / "nshards.txt").write_text("3")
    write_words(root / "short", NAMES)
    write_part(root / "unlike" / "test", [test[:20]])
    write_part(root / "unlike" / "train", [train[:20]])
    (root / "unlike" / "train" / "nshards.txt").unlink()
    write_words(root / "unlike", NAMES[:2])
    write_part(root / "captions" / "test", [[]])
    (root / "captions" / "dataset_type.txt").write_text("retrieval\n")
    (root / "wds_gone").mkdir()
    return root


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One call over the folder, of an untrained student."""
    out = tmp_path_factory.mktemp("out")
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    models.export_student(tower.state_dict(), spec, out / "student")
    words = ["eval", f"{out}/student", "--folder", str(folder), "--index-dir", f"{out}/index"]
    results = ["--json", f"{out}/json/own", "--out", f"{out}/numbers.json"]
    with pytest.MonkeyPatch.context() as patch:
        screens = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", screens[0])
        patch.setattr("sys.stderr", screens[1])
        patch.setenv("COLUMNS", "40")
        code = main(words + results)
    files = {
        path.name: json.loads(path.read_text(), parse_constant=pytest.fail)
        for path in (out / "json" / "own").iterdir()
    }
    numbers = json.loads((out / "numbers.json").read_text())
    printed, told = (screen.getvalue() for screen in screens)
    return Ran(folder, f"{out}/student", code, printed, told, numbers, files)


def record(ran: Ran, dataset: str, task: str) -> dict:
    return next(
        one for one in ran.files.values() if (one["dataset"], one["task"]) == (dataset, task)
    )


def test_scores_are_those_of_single_sets(ran: Ran, tmp_path: Path) -> None:
    whole = ran.root / "wds_vtab-cifar10"
    prompts = f"{whole}/classnames.txt;{whole}/zeroshot_classification_templates.txt"
    words = ["eval", ran.student, "--index-dir", f"{tmp_path}/index"]
    words += ["--zeroshot", f"z={whole}/test;{prompts}"]
    words += ["--probe", f"p={whole}/train;{whole}/test", "--out", f"{tmp_path}/numbers.json"]
    assert main(words) == 0
    single = json.loads((tmp_path / "numbers.json").read_text())
    assert len(single) == 9
    found = {name: value for name, value in ran.numbers.items() if name.startswith("vtab/")}
    assert found == {f"vtab/cifar10/{name[2:]}": value for name, value in single.items()}


def test_the_images_of_the_test_part_are_embedded_once(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = []

    def loader(self: Evaluator, index):
        sizes.append(index.num_samples)
        return original(self, index)

    original = Evaluator._loader
    monkeypatch.setattr(Evaluator, "_loader", loader)
    (few,) = (one for one in find_sets(ran.root) if one.name == "own/few")
    _, failed = suite.evaluate_suite(ran.student, [few], index_dir=f"{tmp_path}/index")
    assert not failed and len(sizes) == 2


def test_each_set_and_task_has_a_file_in_the_layout_of_clip_benchmark(ran: Ran) -> None:
    found = record(ran, "wds/vtab/cifar10", "zeroshot_classification")
    numbers = {name: ran.numbers[f"vtab/cifar10/{name}"] for name in ("zeroshot-top1",)}
    assert found == {
        "dataset": "wds/vtab/cifar10",
        "model": ran.student,
        "pretrained": "none",
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": numbers["zeroshot-top1"],
            "acc5": ran.numbers["vtab/cifar10/zeroshot-top5"],
            "mean_per_class_recall": ran.numbers["vtab/cifar10/zeroshot-mean-per-class-recall"],
        },
        "language": "en",
    }
    probe = record(ran, "wds/vtab/cifar10", "linear_probe")["metrics"]
    assert probe == {
        "lp_acc1": ran.numbers["vtab/cifar10/probe-top1"],
        "lp_acc5": ran.numbers["vtab/cifar10/probe-top5"],
        "lp_mean_per_class_recall": ran.numbers["vtab/cifar10/probe-mean-per-class-recall"],
        "C": ran.numbers["vtab/cifar10/probe-C"],
        "seed": 0,
        "fewshot_k": -1,
        "normalized": True,
    }
    assert 0.1 < probe["lp_acc1"] < probe["lp_acc5"] < 1
    datasets = sorted((one["dataset"], one["task"][:2]) for one in ran.files.values())
    assert datasets == [
        ("wds/fgvc_aircraft", "ze"),
        ("wds/nameless", "li"),
        ("wds/own/few", "li"),
        ("wds/own/few", "ze"),
        ("wds/vtab/cifar10", "li"),
        ("wds/vtab/cifar10", "ze"),
    ]
    for name, one in ran.files.items():
        assert name.startswith(f"{one['dataset'][4:].replace('/', '_')}_none_")
        assert name.endswith(f"_en_{one['task']}.json")


def test_clip_benchmark_can_build_its_table_of_the_files(ran: Ran) -> None:
    for one in ran.files.values():
        row = {**one["metrics"], **one}
        del row["metrics"]
        assert f"{row['model']} {row['pretrained']}" == f"{ran.student} none"
        plain = str, int, float, type(None)
        assert all(isinstance(value, plain) for value in row.values())


def test_of_less_than_five_classes_there_is_no_acc5(ran: Ran) -> None:
    zeroshot = record(ran, "wds/own/few", "zeroshot_classification")["metrics"]
    assert zeroshot["acc5"] is None and 0 < zeroshot["acc1"] < 1
    assert record(ran, "wds/own/few", "linear_probe")["metrics"]["lp_acc5"] is None


def cells(ran: Ran, name: str) -> list[str]:
    rows = (line.split("\u2502") for line in ran.printed.splitlines() if "\u2502" in line)
    return next([cell.strip() for cell in row[2:-1]] for row in rows if row[1].strip() == name)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def test_one_table_has_all_sets_and_their_means(ran: Ran) -> None:
    values = [ran.numbers[f"vtab/cifar10/{name}"] for name in (
        "zeroshot-top1", "zeroshot-top5", "zeroshot-mean-per-class-recall", "zeroshot-top1",
        "probe-top1", "probe-top1",
    )]  # fmt: skip
    assert cells(ran, "vtab/cifar10") == ["150", "10", *map(percent, values)]
    aircraft = cells(ran, "fgvc_aircraft")
    assert aircraft[:2] == ["145", "10"] and aircraft[6:] == ["-", "-"]
    by_class = ran.numbers["fgvc_aircraft/zeroshot-mean-per-class-recall"]
    assert aircraft[4] == aircraft[5] == percent(by_class) != aircraft[2]
    assert cells(ran, "nameless")[:6] == ["40", "10", "-", "-", "-", "-"]
    assert cells(ran, "short") == ["-"] * 8
    acc1 = [value for name, value in ran.numbers.items() if name.endswith("zeroshot-top1")]
    probes = [value for name, value in ran.numbers.items() if name.endswith("probe-top1")]
    assert len(acc1) == len(probes) == 3
    mean = cells(ran, "mean")
    assert mean[2] == percent(np.mean(acc1)) and mean[6] == percent(np.mean(probes))
    acc5 = [ran.numbers[f"{name}/zeroshot-top5"] for name in ("vtab/cifar10", "fgvc_aircraft")]
    assert mean[3] == percent(np.mean(acc5))


def test_a_broken_set_is_told_and_costs_none_of_the_others(ran: Ran) -> None:
    root = ran.root
    assert ran.code == 1
    lines = ran.printed.splitlines()
    assert f"nameless: zero-shot failed: {root}/nameless/classnames.txt and {root}/nameless/" \
        "zeroshot_classification_templates.txt: missing" in lines  # fmt: skip
    assert f"short: zero-shot failed: {root}/short/test/nshards.txt says 3 shards, 2 of them " \
        f"missing: {root}/short/test/1.tar and others" in lines  # fmt: skip
    labels = next(line for line in lines if line.startswith("unlike: zero-shot failed: labels: "))
    assert "expected 0 to 1" in labels
    assert any(line.startswith("unlike: linear probe failed: ") and "train/nshards.txt is missing"
               in line for line in lines)  # fmt: skip
    assert any(line.startswith("captions: not evaluated: ") for line in lines)
    assert any(line.startswith(f"gone: zero-shot failed: the folder {root}/wds_gone/test is "
                               "missing; ") for line in lines)  # fmt: skip
    assert "nameless/probe-top1" in ran.numbers
    assert "fgvc_aircraft: 1 image quarantined" in lines
    assert any(line.startswith("fgvc_aircraft: causes are listed in /") for line in lines)


def test_progress_is_told_set_by_set(ran: Ran) -> None:
    told = [line for line in ran.told.splitlines() if " of 8, " in line]
    assert len(told) == 8
    value = ran.numbers["nameless/probe-top1"]
    assert told[3].endswith(f" s: nameless: linear probe {100 * value:.1f} %, zero-shot failed")


def test_a_whole_folder_ends_well(ran: Ran, tmp_path: Path, capsys) -> None:
    (tmp_path / "aircraft").symlink_to(ran.root / "wds_fgvc_aircraft_test")
    words = ["--folder", str(tmp_path), "--index-dir", f"{tmp_path}/index"]
    assert main(["eval", ran.student, *words]) == 0
    assert "failed" not in capsys.readouterr().out


def test_an_error_in_the_code_costs_no_other_set_and_keeps_its_traceback(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capsys
) -> None:
    def fails(*_, **options):
        raise RuntimeError("from elsewhere")

    monkeypatch.setattr("kdengine.evaluate.evaluator.linear_probe", fails)
    (tmp_path / "few").symlink_to(ran.root / "wds" / "own" / "few")
    words = ["--folder", str(tmp_path), "--index-dir", f"{tmp_path}/index"]
    assert main(["eval", ran.student, *words]) == 1
    assert "few: linear probe failed: from elsewhere" in capsys.readouterr().out
    assert "few: this may be a bug" in caplog.text and "in fails" in caplog.text


def test_a_file_that_cannot_be_written_is_a_fault_of_its_set(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kdengine.evaluate.suite.write_scores", full)
    (tmp_path / "few").symlink_to(ran.root / "wds" / "own" / "few")
    words = ["--folder", str(tmp_path), "--index-dir", f"{tmp_path}/index"]
    assert main(["eval", ran.student, *words, "--json", f"{tmp_path}/json"]) == 1
    assert "few: writing failed: its JSON in" in capsys.readouterr().out


def test_words_of_a_file_name_are_short_and_differ() -> None:
    long = [_plain(f"{number}/{'folder/' * 30}export") for number in range(2)]
    assert long[0] != long[1] and {len(word) for word in long} == {60}
    assert _plain("vtab/cifar10") == "vtab_cifar10"


def test_means_are_over_the_sets_that_have_the_number() -> None:
    names = {"zeroshot-top1": 0.5, "zeroshot-top5": 1.0, "zeroshot-mean-per-class-recall": 0.3}
    task = "zeroshot_classification"
    scores = [
        Scores(LocalSet("vtab/pets", Path()), {task: names | {"zeroshot-classes": 37.0}}),
        Scores(LocalSet("two", Path()), {task: names | {"zeroshot-classes": 2.0}}),
        Scores(LocalSet("none", Path())),
    ]
    last = [list(column.cells)[-1] for column in scores_table(scores, "t").columns]
    assert last == ["mean", "", "", "50.0", "100.0", "30.0", "40.0", "-", "-"]


LONG = ["vtab/diabetic_retinopathy", "vtab/smallnorb_label_elevation", "own/a[b] c"]


def printed(width: int, terminal: bool) -> list[str]:
    """The table's lines on a screen so wide."""
    screen = io.StringIO()
    table = FittingTable([Scores(LocalSet(name, Path())) for name in LONG], "t")
    # as the command prints it
    Console(file=screen, force_terminal=terminal, width=width, color_system=None).print(
        table, crop=False
    )
    return screen.getvalue().splitlines()


def first_cells(lines: list[str]) -> list[str]:
    return [line.split("\u2502")[1].rstrip()[1:] for line in lines if line[0] == "\u2502"]


def test_off_a_terminal_the_table_is_whole() -> None:
    lines = printed(40, terminal=False)
    assert first_cells(lines)[:3] == LONG and "\u2026" not in "".join(lines)
    heads = " ".join(" ".join(lines[:5]).split())
    assert all(word in heads for word in ("images", "classes", "acc5", "class ", "probe"))
    assert "left out" not in " ".join(lines)


def test_a_narrow_terminal_has_whole_names_and_fewer_columns() -> None:
    lines = printed(80, terminal=True)
    assert first_cells(lines)[:3] == LONG and max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "left out, the terminal is narrow: images, acc5, classes, per class" in text
    assert text.count("headline") == 3 and "\u2026" not in text
    wider = " ".join(" ".join(printed(100, terminal=True)).split())
    assert wider.endswith("the terminal is narrow: images, acc5")
    assert "left out" not in " ".join(printed(140, terminal=True))


@pytest.mark.parametrize(("width", "used"), [(60, 60), (20, 58)])
def test_in_the_narrowest_terminal_names_are_folded(width: int, used: int) -> None:
    lines = printed(width, terminal=True)
    names = "".join(first_cells(lines)).replace(" ", "")
    assert names.startswith("".join(LONG).replace(" ", "")) and "\u2026" not in "".join(lines)
    assert max(map(len, lines)) == used
