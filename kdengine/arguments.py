# SPDX-License-Identifier: Apache-2.0
"""The command line of a run: a recipe, then dotted overrides parsed by tyro.

``--recipe NAME`` fills the configuration, every ``--section.key value`` replaces one field of it.
The launcher's ``--local_rank`` and the customary ``--deepspeed`` switch are dropped;
``--resume`` and ``--deepspeed_config`` are short for the fields that hold them.
"""

import dataclasses
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from tyro.conf import Positional, Suppress, arg

from kdengine.config import RunConfig, load_recipe, recipe_names
from kdengine.options import HELP, read, refuse_empty

SHORT = {
    "--resume": "--run.resume",
    "--name": "--run.name",
    "--deepspeed-config": "--train.deepspeed-config",
}
L = TypeVar("L", bound="Line")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """--section.key VALUE overrides the recipe; below are the values without that."""

    matter: ClassVar[Collection[str] | None] = None
    """Options of a run that the command depends on; None: all."""
    refused: ClassVar[Collection[str]] = ()
    """Others that it looks at only to refuse some of their values."""
    recipe: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help=f"What to start from: {', '.join(recipe_names())}, or the path of a .toml file.",
            help_behavior_hint="",
        ),
    ] = None
    config: Annotated[RunConfig, arg(name="")] = RunConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLine(Line):
    """--section.key VALUE overrides the recipe; below are the values without that."""

    resume: Annotated[str | None, arg(metavar="latest|FOLDER", help_behavior_hint="")] = None
    """Go on from the newest checkpoint, or from one in a folder; short for --run.resume."""
    name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Name of the run's folder; short for --run.name."""
    deepspeed_config: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also --deepspeed_config; short for --train.deepspeed-config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLine(Line):
    """--section.key VALUE overrides the recipe; below are the options of a run that matter here."""

    matter: ClassVar[Collection[str] | None] = (
        "--data.train-data",
        "--data.index-dir",
        "--data.max-pixels",
        "--data.workers",
        "--distill.distill-model",
        "--distill.distill-pretrained",
        "--distill.distill-precision",
        "--train.seed",
        "--train.precision",
        "--run.timeout-minutes",
    )
    refused: ClassVar[Collection[str]] = ("--data.dataset-type", "--distill.cache")
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
    return parse_line(TrainLine, argv, description, prog).config


def parse_line(line: type[L], argv: Sequence[str], description: str, prog: str) -> L:
    """Turn command-line words into the options of a run, and what ``line`` has beside them.

    Without ``--recipe`` every field starts from its default. ``--help`` prints all fields with the
    values that the recipe gives them. What is wrong is printed with its mend, and the process
    ends with code 2.
    """
    places = _required(line)
    try:
        refuse_empty(argv)
        recipe, rest = split(argv)
        config = load_recipe(recipe) if recipe else RunConfig()
        if HELP.intersection(rest):
            # tyro breaks no line of a description
            print(_wrapped(description.strip()), end="\n\n")
            config = config if line.matter is None else _showing(config, line.matter)
        else:
            values = read(rest, option_types(line), [name.upper() for name in places], prog)
            _tell_idle(values, line, prog)
            config = _one_length(config, values)
            # tyro would put what a section refuses into a box
            _replaced(config, values)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # the short names have been spelled out by now
    start = line(**dict.fromkeys(places, tyro.MISSING), config=config)
    return tyro.cli(line, prog=prog, default=start, args=rest)


def _tell_idle(values: Collection[str], line: type[Line], prog: str) -> None:
    """Name the options of a run that mean nothing to the command: a training's line may go on."""
    if line.matter is None:
        return
    own = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(line)}
    idle = [option for option in values if option not in own.union(line.matter, line.refused)]
    # the launcher's word: once for all ranks
    if idle and os.environ.get("RANK", "0") == "0":
        print(f"note: nothing that '{prog}' does depends on {', '.join(idle)}", file=sys.stderr)


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


def _one_length(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Let a length given on the command line replace the recipe's, in steps or in epochs."""
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


def _replaced(config: Any, values: Mapping[str, Any], prefix: str = "--") -> Any:
    """The configuration with the values of some options; each section checks its own."""
    changes = {}
    for field in dataclasses.fields(config):
        old, option = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(old):
            changes[field.name] = _replaced(old, values, f"{option}.")
        elif option in values:
            changes[field.name] = values[option]
    return dataclasses.replace(config, **changes)


def _showing(config: Any, names: Collection[str], prefix: str = "--") -> Any:
    """The same configuration, of a type of whose options help shows these alone."""
    cls = type(config)
    hints, values, shown = typing.get_type_hints(cls), {}, []
    # made at run time, which no type checker can follow
    hide: Any = Suppress
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), prefix + field.name.replace("_", "-")
        hint = hints[field.name]
        if dataclasses.is_dataclass(value):
            value = _showing(value, names, f"{option}.")
            hint = type(value)
        elif option not in names:
            hint = hide[hint]
        values[field.name] = value
        shown.append((field.name, hint))
    made = dataclasses.make_dataclass(cls.__name__, shown, bases=(cls,), frozen=True, kw_only=True)
    made.__doc__ = cls.__doc__
    return made(**values)


def option_types(line: type[Line] = TrainLine) -> dict[str, Any]:
    """Every option but the short ones, in the order of the configuration, with its type."""
    hints = typing.get_type_hints(line)
    shared = {field.name for field in dataclasses.fields(TrainLine)} | set(_required(line))
    found = {
        f"--{field.name.replace('_', '-')}": hints[field.name]
        for field in dataclasses.fields(line)
        if field.name not in shared
    }

    def visit(config: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(config))
        for field in dataclasses.fields(config):
            value, dashed = getattr(config, field.name), field.name.replace("_", "-")
            if dataclasses.is_dataclass(value):
                visit(value, f"{prefix}{dashed}.")
                continue
            found[f"--{prefix}{dashed}"] = hints[field.name]
            if isinstance(value, bool):
                found[f"--{prefix}no-{dashed}"] = bool

    visit(RunConfig(), "")
    return found
