# SPDX-License-Identifier: Apache-2.0
"""A recipe of several trainings, each of which goes on from the student of the one before.

It starts from that student, or learns from it: this where the stage's own recipe names, as its
teacher, what the recipe of the stage before exports when it is run alone.

``stages = ["RECIPE", ...]`` at the top of a recipe makes it such a one; beside it may stand the
name of the run. Stage S is a run of its own in ``LOGS/NAME/S``. Every stage is resumed, so that the
command of a run that was stopped is simply given again: a stage that is complete says that nothing
is left to train, and one that fails ends the command.
"""

from collections.abc import Sequence
from pathlib import Path

from kdengine import LOCAL_DIR, arguments
from kdengine.config import load_recipe, recipe_stages


def stage_lines(words: Sequence[str]) -> list[list[str]]:
    """The command line of each stage; that of the run itself where its recipe has no stages.

    What else the words say holds for every stage. Of an option that is there twice the last counts.

    Raises:
        ValueError, FileNotFoundError: see ``split`` and ``recipe_stages``.
    """
    recipe, rest = arguments.split(words)
    stages = recipe_stages(recipe) if recipe else ()
    if not stages or {"-h", "--help"}.intersection(rest):
        return [list(words)]
    run = arguments.parse(words).run
    lines: list[list[str]] = []
    before = alone = ""
    for stage in stages:
        name = f"{run.name}/{Path(stage).stem}"
        line = ["--recipe", stage, *rest, "--run.name", name, "--run.logs", run.logs]
        line += ["--run.resume", "latest"]
        config = load_recipe(stage)
        if before:
            taught = config.distill.distill_model == (alone,)
            option = "--distill.distill-model" if taught else "--model.model"
            line += [option, f"{LOCAL_DIR}{run.logs}/{before}/export"]
        lines.append(line)
        before, alone = name, f"{LOCAL_DIR}{config.run.logs}/{config.run.name}/export"
    return lines
