# SPDX-License-Identifier: Apache-2.0
"""A recipe of several trainings, each of which starts from the student of the one before.

``stages = ["RECIPE", ...]`` at the top of a recipe makes it such a one; beside it may stand the
name of the run. Stage S is a run of its own in ``LOGS/NAME/S``. Every stage is resumed, so that the
command of a run that was stopped is simply given again: a stage that is complete says that nothing
is left to train, and one that fails ends the command.
"""

from collections.abc import Sequence
from pathlib import Path

from kdengine import arguments
from kdengine.config import load_recipe, recipe_stages

# what a stage decides for itself
OWN = ("--run.name", "--run.resume")


def stage_lines(words: Sequence[str]) -> list[list[str]]:
    """The command line of each stage; that of the run itself where its recipe has no stages.

    What else the words say holds for every stage.

    Raises:
        ValueError, FileNotFoundError: see ``split`` and ``load_recipe``.
    """
    recipe, rest = arguments.split(words)
    stages = recipe_stages(recipe) if recipe else ()
    if recipe is None or not stages or {"-h", "--help"}.intersection(rest):
        return [list(words)]
    given, rest = _without(rest, OWN)
    shared = load_recipe(recipe).run
    folder = given.get("--run.name", shared.name)
    logs = _without(rest, ("--run.logs",))[0].get("--run.logs", shared.logs)
    lines: list[list[str]] = []
    for stage in stages:
        name = f"{folder}/{Path(stage).stem}"
        line = ["--recipe", stage, *rest, "--run.logs", logs, "--run.name", name]
        line += ["--run.resume", "latest"]
        if lines:
            before = f"{logs}/{folder}/{Path(stages[len(lines) - 1]).stem}"
            line += ["--model.model", f"local-dir:{before}/export"]
        lines.append(line)
    return lines


def _without(words: Sequence[str], options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of some options, and the other words."""
    found: dict[str, str] = {}
    left: list[str] = []
    waiting = None
    for word in words:
        option, equals, value = word.partition("=")
        if waiting is not None:
            found[waiting], waiting = word, None
        elif option.replace("_", "-") in options:
            if equals:
                found[option.replace("_", "-")] = value
            else:
                waiting = option.replace("_", "-")
        else:
            left.append(word)
    return found, left
