# SPDX-License-Identifier: Apache-2.0
"""Recipes of several trainings: the command line of each."""

from pathlib import Path

import pytest

from kdengine import arguments
from kdengine.config import load_recipe, recipe_stages
from kdengine.stages import stage_lines

STAGES = ["tinyclip_auto_75", "tinyclip_auto_50", "tinyclip_auto_25"]


def test_each_stage_starts_from_the_student_of_the_one_before() -> None:
    words = ["--recipe", "tinyclip_auto_75_50_25", "--train.batch-size=8", "--local_rank=0"]
    words += ["--data.train-data", "x.tar", "--run.logs=/logs", "--name", "mine", "--resume=3"]
    configs = [arguments.parse(line) for line in stage_lines(words)]
    assert [config.run.name for config in configs] == [f"mine/{stage}" for stage in STAGES]
    assert [config.model.model for config in configs] == [
        "ViT-B-32",
        "local-dir:/logs/mine/tinyclip_auto_75/export",
        "local-dir:/logs/mine/tinyclip_auto_50/export",
    ]
    assert [config.prune.target for config in configs] == [0.25, 0.5, 0.75]
    for config in configs:
        assert config.run.resume == "latest" and config.run.logs == "/logs"
        assert config.train.batch_size == 8 and config.data.train_data == "x.tar"
        assert config.distill.teachers() == [("ViT-B-32", "laion2b_e16")]


def test_a_stage_learns_from_the_one_before_where_its_recipe_does() -> None:
    words = ["--recipe", "comkd_stages", "--run.logs=/logs", "--name", "mine"]
    first, second = (arguments.parse(line) for line in stage_lines(words))
    assert first.model.model == "ViT-L-14-quickgelu" and first.distill.distill_model == ()
    assert second.model.model == "ViT-B-16-quickgelu"
    assert second.distill.distill_model == ("local-dir:/logs/mine/comkd_teacher/export",)
    assert (first.classes.half, first.classes.shots) == ("base", 16)
    assert (second.classes.half, second.classes.shots) == ("all", 0)


def test_other_recipes_are_left_alone() -> None:
    for words in (["--recipe", "clip_kd", "--run.name", "a"], ["--train.steps", "3"]):
        assert stage_lines(words) == [words]
    help_words = ["--recipe", "tinyclip_auto_75_50_25", "--help"]
    assert stage_lines(help_words) == [help_words]


def test_a_recipe_with_stages_reads_as_its_first() -> None:
    config = load_recipe("tinyclip_auto_75_50_25")
    assert config.prune.target == 0.25 and config.run.name == "tinyclip_auto"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ('"clip_kd"', "expected a list of recipes"),
        ('["clip_kd", 3]', "expected a list of recipes"),
        ('["tinyclip_auto_75_50_25"]', "has stages of its own"),
        ('["clip_k"]', "Did you mean 'clip_kd'"),
    ],
)
def test_stages_that_are_none_are_refused(tmp_path: Path, stages: str, message: str) -> None:
    path = tmp_path / "staged.toml"
    path.write_text(f"stages = {stages}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe_stages(str(path))
