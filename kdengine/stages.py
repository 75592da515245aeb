# SPDX-License-Identifier: Apache-2.0
"""A recipe of several trainings, each of which starts from the student of the one before.

``stages = ["RECIPE", ...]`` at the top of a recipe makes it such a one; beside it may stand the
name of the run. Stage S is a run of its own in ``LOGS/NAME/S``. Every stage is resumed, so that the
command of a run that was stopped is simply given again: a stage that is complete says that nothing
is left to train, and one that fails ends the command.
"""

from collections.abc import Sequence
from pathlib import Path

from kdengine import LOCAL_DIR, arguments
from kdengine.config import recipe_stages


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
    before = ""
    for stage in stages:
        name = f"{run.name}/{Path(stage).stem}"
        line = ["--recipe", stage, *rest, "--run.name", name, "--run.logs", run.logs]
        line += ["--run.resume", "latest"]
        if before:
            line += ["--model.model", f"{LOCAL_DIR}{run.logs}/{before}/export"]
        lines.append(line)
        before = name
    return lines
