# SPDX-License-Identifier: Apache-2.0
"""Which data sets a folder holds, what they are called, and what each lacks."""

import re
from pathlib import Path

import pytest

from kdengine.cli import main
from kdengine.evaluate import EvalSet, find_sets
from kdengine.evaluate.layout import CLASSNAMES, COUNT, KIND, PROBE, TEMPLATES, ZEROSHOT, LocalSet


def make(folder: Path, **parts: int) -> Path:
    """A set whose parts have so many shards, empty files."""
    for part, num in parts.items():
        (folder / part).mkdir(parents=True)
        for number in range(num):
            (folder / part / f"{number}.tar").touch()
        (folder / part / COUNT).write_text(f"{num}\n")
    (folder / CLASSNAMES).write_text("dog\ncat\n")
    (folder / TEMPLATES).write_text("a {c}\n")
    return folder


def only(root: Path) -> LocalSet:
    (found,) = find_sets(root)
    return found


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("wds_vtab-cifar10", "vtab/cifar10"),
        ("wds_vtab-cifar10_test", "vtab/cifar10"),
        ("vtab/cifar10", "vtab/cifar10"),
        ("wds/vtab/cifar10", "vtab/cifar10"),
        ("wds_imagenet-a", "imagenet-a"),
        ("more/wds_imagenet1k", "imagenet1k"),
        ("wilds-fmow", "wilds/fmow"),
        ("my set", "my set"),
        ("own_test", "own_test"),
    ],
)
def test_a_set_is_named_by_its_place(tmp_path: Path, place: str, name: str) -> None:
    make(tmp_path / place, test=1)
    assert only(tmp_path).name == name


def test_the_folder_may_be_a_set_itself(tmp_path: Path) -> None:
    make(tmp_path / "wds_vtab-pets", test=1)
    assert only(tmp_path / "wds_vtab-pets").name == "vtab/pets"


def test_tasks_are_those_that_the_parts_allow(tmp_path: Path) -> None:
    both, half = make(tmp_path / "a b", test=12, train=1), make(tmp_path / "c", test=1)
    first, second = find_sets(tmp_path)
    test = f"{both}/test/{{0..11}}.tar"
    assert first.tasks == {
        ZEROSHOT: EvalSet(
            name="a-b",
            shards=test,
            kind="zeroshot",
            classnames=f"{both}/{CLASSNAMES}",
            templates=f"{both}/{TEMPLATES}",
        ),
        PROBE: EvalSet(name="a-b", shards=f"{both}/train/0.tar", test=test, kind="probe"),
    }
    assert (
        list(second.tasks) == [ZEROSHOT] and second.tasks[ZEROSHOT].shards == f"{half}/test/0.tar"
    )
    assert not first.faults and not second.faults


def remove_test(folder: Path) -> None:
    for path in (folder / "test").iterdir():
        path.unlink()
    (folder / "test").rmdir()


@pytest.mark.parametrize(
    ("spoil", "task", "match"),
    [
        (lambda f: (f / CLASSNAMES).unlink(), ZEROSHOT, f"^[^ ]*/s/{CLASSNAMES}: missing"),
        (remove_test, ZEROSHOT, "^the folder [^ ]*/s/test is missing"),
        (lambda f: (f / "test" / COUNT).unlink(), ZEROSHOT, "test/nshards.txt is missing.*3 are"),
        (lambda f: (f / "test" / COUNT).write_text(""), ZEROSHOT, "number of shards, got ''"),
        (lambda f: (f / "train" / COUNT).write_text("0"), PROBE, "number of shards, got '0'"),
        (lambda f: (f / "train" / COUNT).write_text("1"), PROBE, "1 shard, .* also 1.tar"),
        (
            lambda f: (f / "test" / "2.tar").unlink(),
            ZEROSHOT,
            "says 3 shards, 1 of them missing: [^ ]*/test/2.tar$",
        ),
        (
            lambda f: (f / "train" / COUNT).write_text("11"),
            PROBE,
            "9 of them missing: [^ ]*/2.tar and others",
        ),
    ],
    ids=["names", "test", "count", "empty", "none", "more", "shard", "shards"],
)
def test_what_a_set_lacks_is_told(tmp_path: Path, spoil, task: str, match: str) -> None:
    folder = make(tmp_path / "s", test=3, train=2)
    spoil(folder)
    one = only(tmp_path)
    assert list(one.faults) == [task] and re.search(match, one.faults[task])
    # the probe needs no class names, but a test part
    assert task not in one.tasks
    assert (PROBE in one.tasks) == (spoil is not remove_test and task == ZEROSHOT
                                    and "test/" not in one.faults[task])  # fmt: skip


@pytest.mark.parametrize("kind", ["retrieval", "multilabel", "segmentation"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "empty"])
def test_what_is_no_classification_is_left_out(tmp_path: Path, kind: str, whole: bool) -> None:
    folder = tmp_path / "s"
    make(folder, test=1) if whole else (folder / "test").mkdir(parents=True)
    (folder / KIND).write_text(f"{kind}\n")
    one = only(tmp_path)
    assert not one.tasks and not one.faults and f"says {kind}," in one.left_out


def test_a_set_that_says_it_is_classification_is_evaluated(tmp_path: Path) -> None:
    (make(tmp_path / "s", test=1) / KIND).write_text("Classification\n")
    assert list(only(tmp_path).tasks) == [ZEROSHOT] and not only(tmp_path).left_out


@pytest.mark.parametrize(
    ("path", "lacks"),
    [
        ("wds_s/", "the folder {}/test is missing"),
        ("wds_s/0.tar", "the folder {}/test is missing"),
        ("s/test/", "{}/test/nshards.txt is missing, the number of shards (0 are there)"),
        ("s/test/0.tar", "{}/test/nshards.txt is missing, the number of shards (1 are there)"),
        ("s/train/0.tar", "the folder {}/test is missing"),
        ("s/dataset_type.txt", "the folder {}/test is missing"),
        ("a/b/c/wds_s/", "the folder {}/test is missing"),
    ],
)
def test_what_is_meant_as_a_set_says_all_that_it_lacks(
    tmp_path: Path, path: str, lacks: str
) -> None:
    make(tmp_path / "whole", test=1)
    place = tmp_path / path
    (place if path.endswith("/") else place.parent).mkdir(parents=True)
    if not path.endswith("/"):
        place.touch()
    broken, whole = sorted(find_sets(tmp_path), key=lambda one: one.name == "whole")
    assert not whole.faults and not broken.tasks
    told = lacks.format(broken.folder)
    told += f"; {broken.folder}/{CLASSNAMES} and {broken.folder}/{TEMPLATES}: missing"
    assert broken.folder.name in ("s", "wds_s") and broken.faults == {ZEROSHOT: told}


def test_a_folder_of_sets_is_none_by_its_name(tmp_path: Path) -> None:
    make(tmp_path / "wds_all" / "test" / "dtd", test=1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").touch()
    assert only(tmp_path).folder == tmp_path / "wds_all" / "test" / "dtd"
    # beside an empty test part a set is no excuse
    (tmp_path / "more" / "test").mkdir(parents=True)
    make(tmp_path / "more" / "pets", test=1)
    assert [one.name for one in find_sets(tmp_path) if one.faults] == ["more"]


def test_shards_alone_in_the_folder_say_what_they_lack(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").touch()
    assert only(tmp_path).folder == tmp_path and only(tmp_path).faults


def test_each_folder_is_visited_once_and_named_by_its_own_place(tmp_path: Path) -> None:
    folder = make(tmp_path / "x" / "dtd", test=1)
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(folder)
    (tmp_path / "self").symlink_to("self")
    assert only(tmp_path).name == "x/dtd"


@pytest.mark.parametrize(
    ("name", "by_class"),
    [("vtab/pets", True), ("fgvc_aircraft", True), ("oxford-flowers102", True), ("cars", False)],
)
def test_sets_of_uneven_classes_are_scored_by_class(name: str, by_class: bool) -> None:
    assert LocalSet(name, Path()).by_class == by_class


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "wds_vtab-dtd", test=1)
    make(tmp_path / "vtab" / "dtd", test=1)
    with pytest.raises(ValueError, match="vtab/dtd and .*wds_vtab-dtd are the set vtab/dtd"):
        find_sets(tmp_path)


def test_a_folder_without_sets_says_what_was_expected_and_found(tmp_path: Path, capsys) -> None:
    for name in "abcdefg":
        (tmp_path / name).mkdir()
    (tmp_path / "x.tar").touch()
    assert main(["eval", "ViT-T-16", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: eval: --folder {tmp_path} holds no data set in CLIP_benchmark's" in error
    assert "test/nshards.txt, test/0.tar, ..., classnames.txt" in error
    assert "found 7 folders (a, b, c, d, e, ...) and 1 file (x.tar)" in error


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--folder", "{}/no"], "no does not exist"),
        (["--folder", "{}/s/classnames.txt"], "classnames.txt is a file"),
        (["--folder", "{}", "--zeroshot", "a=b.tar"], "--folder brings its own sets"),
        (["--folder", "{}", "--teacher", "ViT-T-16"], "--folder brings its own sets"),
        (["--retrieval", "a=b.tar", "--json", "{}"], "--json writes the results of --folder"),
        (["--folder", "{}", "--json", "{}/s/classnames.txt"], "is a file; expected a folder"),
        (["--folder", "{}", "--json", "{}", "--out", "{}/o.json"], "in the folder of --json"),
    ],
    ids=["nowhere", "file", "set", "teacher", "no folder", "file for json", "out in json"],
)
def test_words_that_do_not_fit_are_refused(tmp_path: Path, capsys, words, match: str) -> None:
    make(tmp_path / "s", test=1)
    assert main(["eval", "ViT-T-16", *(word.format(tmp_path) for word in words)]) == 2
    assert match in capsys.readouterr().err
