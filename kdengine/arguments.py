# SPDX-License-Identifier: Apache-2.0
"""The command line of a run: a recipe, then dotted overrides parsed by tyro.

``--recipe NAME`` fills the configuration, every ``--section.key value`` replaces one field of it.
The launcher's ``--local_rank`` and the customary ``--deepspeed`` switch are dropped;
``--resume`` and ``--deepspeed_config`` are short for the fields that hold them.
"""

import dataclasses
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import Positional, arg

from kdengine.config import RunConfig, load_recipe, recipe_names

SHORT = {
    "--resume": "--run.resume",
    "--name": "--run.name",
    "--deepspeed-config": "--train.deepspeed-config",
}
L = TypeVar("L", bound="Line")
MAY_BE_EMPTY = "--distill.distill-pretrained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """--section.key VALUE overrides the recipe; below are the values without that."""

    recipe: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help=f"What to start from: {', '.join(recipe_names())}, or the path of a .toml file.",
            help_behavior_hint="",
        ),
    ] = None
    resume: Annotated[str | None, arg(metavar="latest|FOLDER", help_behavior_hint="")] = None
    """Go on from the newest checkpoint, or from one in a folder; short for --run.resume."""
    name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Name of the run's folder; short for --run.name."""
    deepspeed_config: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also --deepspeed_config; short for --train.deepspeed-config."""
    config: Annotated[RunConfig, arg(name="")] = RunConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLine(Line):
    """Of a run's options these matter: data.*, distill.*, train.seed (of the crops), and
    train.precision with distill.distill-precision (of the teachers).
    """

    out: Annotated[Positional[str], arg(metavar="OUT", help_behavior_hint="(required)")]
    """Folder of the cache; one that is there is gone on with."""
    views: Annotated[int, arg(metavar="INT")] = 4
    """Random crops of every image to store; training draws one of them at each step."""
    storage: Literal["fp32", "bf16", "int8"] = "bf16"
    """How embeddings are stored; the error of each is measured and told."""
    batch_size: Annotated[int, arg(metavar="INT")] = 256
    """Images or captions in a forward pass of the teachers, on each rank."""


def split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``--recipe`` and the launcher's words out of ``argv``.

    Returns:
        The recipe's name (None when there is none) and the words left for tyro, with the short
        names of ``SHORT`` spelled out.

    Raises:
        ValueError: ``--recipe`` without a name.
    """
    recipe, rest = None, []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        key = option.replace("_", "-")
        if key == "--local-rank":
            if not equals:
                next(words, None)
        elif key == "--deepspeed":
            continue
        elif key == "--recipe":
            recipe = value if equals else next(words, None)
            if not recipe or recipe.startswith("--"):
                raise ValueError(f"--recipe: expected a name, one of {', '.join(recipe_names())}")
        else:
            rest.append(SHORT.get(key, option) + equals + value)
    return recipe, rest


def parse(argv: Sequence[str], description: str = "", prog: str = "kdengine/train.py") -> RunConfig:
    """The configuration of a run, from the words of its command line; see ``parse_line``."""
    return parse_line(Line, argv, description, prog).config


def parse_line(line: type[L], argv: Sequence[str], description: str, prog: str) -> L:
    """Turn command-line words into the options of a run, and what ``line`` has beside them.

    Without ``--recipe`` every field starts from its default. ``--help`` prints all fields with the
    values that the recipe gives them. What is wrong is printed with its mend, and the process
    ends with code 2.
    """
    try:
        refuse_empty(argv)
        recipe, rest = split(argv)
        default = _one_length(load_recipe(recipe) if recipe else RunConfig(), rest)
        unknown = _unknown(rest, option_names(line))
        if unknown:
            raise ValueError(unknown)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if {"-h", "--help"}.intersection(rest):
        # tyro breaks no line of a description
        print(_wrapped(description.strip()), end="\n\n")
    try:
        # what Line names beside the configuration has been taken out or spelled out by now
        start = line(**dict.fromkeys(_required(line), tyro.MISSING), config=default)
        return tyro.cli(line, prog=prog, default=start, args=rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _wrapped(text: str) -> str:
    """A text in lines that fit the terminal; an indented line breaks only at its column gap."""
    width, parts = shutil.get_terminal_size().columns, []
    for part in text.split("\n\n"):
        if not part.startswith(" "):
            part = textwrap.fill(part, width)
        elif max(map(len, part.split("\n"))) > width:
            part = re.sub(r"(?<=\S) {2,}", "\n" + " " * 8, part)
        parts.append(part)
    return "\n\n".join(parts)


def refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty word: as a folder it would mean the current one, and nothing else either.

    Only among ``--distill.distill-pretrained`` it stands for a teacher that has none.

    Raises:
        ValueError: naming the option.
    """
    given = ""
    for last, word in zip(["", *words], words, strict=False):
        given = word.partition("=")[0].replace("_", "-") if word.startswith("--") else given
        if given == MAY_BE_EMPTY:
            continue
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            option = word if word.strip() else last
            where = option.rstrip("=") if option.startswith("--") else f"after {option!r}"
            raise ValueError(f"{where}: expected a value, got an empty text")


def _one_length(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """Let a length given on the command line replace the recipe's, in steps or in epochs."""
    given = {word.partition("=")[0] for word in words}
    steps, epochs = "--train.steps" in given, "--train.epochs" in given
    if steps == epochs:
        return config
    train = config.train
    train = (
        dataclasses.replace(train, epochs=None) if steps else dataclasses.replace(train, steps=None)
    )
    return dataclasses.replace(config, train=train)


def _required(line: type[Line]) -> list[str]:
    """Fields without a default: positional words."""
    fields = dataclasses.fields(line)
    return [field.name for field in fields if field.default is dataclasses.MISSING]


def _unknown(words: Sequence[str], known: Sequence[str]) -> str | None:
    """Name the first option that no field has, with the nearest one that exists."""
    for word in words:
        if not re.match(r"--[A-Za-z]", word):
            continue
        option = word.partition("=")[0].replace("_", "-")
        if option not in known and option != "--help":
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            return f"unknown option {word.partition('=')[0]}; {hint}"
    return None


def option_names(line: type[Line] = Line) -> list[str]:
    """Every option of the command line but the short ones, in the order of the configuration."""
    own = [field.name for field in dataclasses.fields(line)]
    shared = {field.name for field in dataclasses.fields(Line)} | set(_required(line))
    names = [f"--{name.replace('_', '-')}" for name in own if name not in shared]

    def visit(value: object, prefix: str) -> None:
        for name in value.__dataclass_fields__:  # type: ignore[attr-defined]
            field = getattr(value, name)
            dashed = name.replace("_", "-")
            if hasattr(field, "__dataclass_fields__"):
                visit(field, f"{prefix}{dashed}.")
            else:
                names.append(f"--{prefix}{dashed}")
                if isinstance(field, bool):
                    names.append(f"--{prefix}no-{dashed}")

    visit(RunConfig(), "")
    return names
