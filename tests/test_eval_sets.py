# SPDX-License-Identifier: Apache-2.0
"""How evaluation sets are written, and that errors name the set they belong to."""

from pathlib import Path

import pytest

from kdengine import evaluate
from kdengine.evaluate import EvalSet


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "cifar-classnames.txt").write_text("dog\ncat\n")
    (tmp_path / "cifar-templates.txt").write_text("a {}\n")
    return tmp_path


@pytest.mark.parametrize(
    "shards", ["cifar-zeroshot.tar", "cifar-zeroshot-{000..009}.tar", "cifar-zeroshot_{0..9}.tar"]
)
def test_prompt_files_are_found_beside_the_shards(prompts, shards):
    (found,) = evaluate.parse_eval_sets([], [f"c10={prompts}/{shards}"])
    assert found == EvalSet(
        name="c10",
        shards=f"{prompts}/{shards}",
        kind="zeroshot",
        classnames=f"{prompts}/cifar-classnames.txt",
        templates=f"{prompts}/cifar-templates.txt",
    )


def test_sets_are_read_in_order(prompts):
    word = f"in = /data/val.tar ; imagenet ; {prompts}/cifar-templates.txt"
    found = evaluate.parse_eval_sets(["coco=/data/coco-{0..3}.tar", "f=a.tar::b.tar"], [word])
    assert [one.name for one in found] == ["coco", "f", "in"]
    assert found[1].shards == "a.tar::b.tar"
    assert (found[2].shards, found[2].classnames) == ("/data/val.tar", "imagenet")


def test_a_probe_has_two_parts():
    (found,) = evaluate.parse_eval_sets([], [], ["c = /d/train-{0..3}.tar ; /d/test"])
    assert found == EvalSet(name="c", shards="/d/train-{0..3}.tar", test="/d/test", kind="probe")
    assert found.parts() == ("/d/train-{0..3}.tar", "/d/test")


@pytest.mark.parametrize("word", ["c=a.tar", "c=a.tar;", "c=a.tar;b.tar;d.tar", "c=;b.tar"])
def test_a_probe_without_two_parts_is_refused(word):
    with pytest.raises(ValueError, match="evaluation set c: expected"):
        evaluate.parse_eval_sets([], [], [word])


@pytest.mark.parametrize(("kind", "test"), [("probe", None), ("retrieval", "b.tar")])
def test_only_a_probe_has_a_test_part(kind, test):
    with pytest.raises(ValueError, match="needs a part to test on"):
        EvalSet(name="x", shards="x.tar", kind=kind, test=test)


@pytest.mark.parametrize(
    ("retrieval", "zeroshot", "match"),
    [
        (["/data/val.tar"], [], "expected 'NAME=SHARDS'"),
        (["/data/a=b.tar"], [], "expected 'NAME=SHARDS'"),
        (["a="], [], "expected 'NAME=SHARDS'"),
        (["a b=x.tar"], [], "made of letters"),
        (["a=x.tar", "a=y.tar"], [], r"given twice: \['a'\]"),
        ([], ["a=x.tar;imagenet"], "expected 'NAME=SHARDS;CLASSNAMES;TEMPLATES'"),
    ],
    ids=["no name", "path", "no shards", "blank", "twice", "one file"],
)
def test_malformed_sets_are_refused(retrieval, zeroshot, match):
    with pytest.raises(ValueError, match=match):
        evaluate.parse_eval_sets(retrieval, zeroshot)


def test_shards_without_prompts_are_refused(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(ValueError, match=r"set a: .*X-zeroshot.tar with X-classnames.txt"):
        evaluate.parse_eval_sets([], [f"a={tmp_path}/x.tar"])


@pytest.mark.parametrize("shards", ["/nowhere/x.tar", "/nowhere/x-zeroshot.tar"])
def test_missing_shards_are_named_before_the_prompts_that_belong_to_them(shards):
    with pytest.raises(FileNotFoundError, match=f"^evaluation set a: shards: .*no file {shards}"):
        evaluate.parse_eval_sets([], [f"a={shards}"])


def test_missing_prompts_of_shards_that_are_there_are_named(tmp_path):
    (tmp_path / "x-zeroshot.tar").touch()
    with pytest.raises(FileNotFoundError, match="^evaluation set a: class names: .*x-classnames"):
        evaluate.parse_eval_sets([], [f"a={tmp_path}/x-zeroshot.tar"])


def test_missing_class_names_are_an_error_of_their_set():
    with pytest.raises(FileNotFoundError, match="^evaluation set c10: class names: .*/nowhere/a"):
        evaluate.parse_eval_sets([], ["c10=x.tar;/nowhere/a;/nowhere/b"])


def test_zeroshot_set_without_templates_is_refused():
    with pytest.raises(ValueError, match="needs class names and templates"):
        EvalSet(name="x", shards="x.tar", kind="zeroshot", classnames="imagenet")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, RuntimeError])
def test_an_error_names_its_set_and_keeps_its_origin(error):
    def fails():
        raise error("images: too few")

    with (
        pytest.raises(error, match="^evaluation set a: images: too few$") as caught,
        EvalSet(name="a", shards="x.tar", kind="retrieval").named_in_errors(),
    ):
        fails()
    assert caught.traceback[-1].name == "fails"
