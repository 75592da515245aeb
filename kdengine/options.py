# SPDX-License-Identifier: Apache-2.0
"""What the words of a command line give to options, found out before tyro parses them.

tyro refuses wrong words as well, in a box of many lines; here a refusal is one.
"""

import difflib
import inspect
import re
import types
import typing
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = {"-h", "--help"}
MAY_BE_EMPTY = "--distill.distill-pretrained"
WORDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
# a name further off is a guess that misleads; this lets two wrong letters of ten pass
NEAR = 0.8
_OPTION = re.compile("--?[A-Za-z]")


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


def read(
    words: Sequence[str], options: Mapping[str, Any], places: Sequence[str], prog: str
) -> dict[str, Any]:
    """Read the words of a command line.

    Args:
        words: what follows the command.
        options: names, with the types of their values.
        places: names of the other words; the last one may end in ``...`` and be any number.
        prog: the command, for messages.

    Returns:
        Values by the names of options; a switch that is off has the name of the one that is on.

    Raises:
        ValueError: naming the option, what it takes and what came.
    """
    values: dict[str, Any] = {}
    others: list[str] = []
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if not _OPTION.match(word):
            others.append(word)
            continue
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        if option not in options:
            raise ValueError(_unknown(name, options))
        kind, given = options[option], [value] if equals else []
        if kind is bool:
            off = re.fullmatch(r"(--(?:.+\.)?)no-(.+)", option)
            values[off[1] + off[2] if off else option] = not off
            if equals:
                raise ValueError(f"{name}: takes no value, got {value!r}")
            continue
        several = typing.get_origin(kind) is tuple
        while not equals and rest and not _OPTION.match(rest[0]) and (several or not given):
            given.append(rest.popleft())
        values[option] = tuple(given) if several else _value(name, kind, given)
    _count(others, places, prog)
    return values


def _unknown(name: str, options: Collection[str]) -> str:
    """Say that there is no such option, and which are near, or end alike."""
    option = name.replace("_", "-")
    alike = [known for known in options if known.endswith(f".{option.removeprefix('--')}")]
    near = alike or difflib.get_close_matches(option, options, 1, NEAR)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    return f"unknown option {name}; {hint}"


def _value(option: str, kind: Any, given: Sequence[str]) -> Any:
    """The word after an option as the type that it takes."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if is_union and list(given) == ["None"]:
        return None
    if is_union:
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    choices = typing.get_args(kind)
    expected = f"one of {', '.join(map(str, choices))}" if choices else WORDS[kind]
    for word in given:
        for choice in choices:
            if word == str(choice):
                return choice
        if not choices:
            try:
                return kind(word)
            except ValueError:
                pass
        raise ValueError(f"{option}: expected {expected}, got {word!r}")
    raise ValueError(f"{option}: expected {expected}, got nothing")


def _count(words: Sequence[str], places: Sequence[str], prog: str) -> None:
    """Refuse too few words that belong to no option, and too many."""
    command = prog.split()[-1]
    if places and places[-1].endswith("..."):
        return
    if missing := places[len(words) :]:
        raise ValueError(
            f"{command}: expected {' and '.join(missing)} before the options, got nothing"
        )
    if len(words) > len(places):
        raise ValueError(
            f"{command}: the word {words[len(places)]!r} belongs to no option; quote a value that "
            "holds blanks, braces or wildcards"
        )


def check_call(function: Callable[..., Any], words: Sequence[str], prog: str) -> None:
    """``read`` the words of a command that is a function, its options being keyword-only.

    Raises:
        ValueError: see ``read``.
    """
    hints = typing.get_type_hints(function)
    options, places = {}, []
    for parameter in inspect.signature(function).parameters.values():
        name, kind = parameter.name, hints[parameter.name]
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[f"--{name.replace('_', '-')}"] = kind
        else:
            places.append(name.upper() + "..." * (typing.get_origin(kind) is tuple))
    read(words, options, places, prog)
