# SPDX-License-Identifier: Apache-2.0
"""Class names and prompt templates, read from text files."""

from pathlib import Path

IMAGENET = "imagenet"
PLACES = ("{}", "{c}")


def read_classnames(path: str) -> list[str]:
    """Class names, one a line, line number (from 0) = class; ``imagenet`` for open_clip's 1000.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty or no UTF-8, or a line is blank.
    """
    if path == IMAGENET:
        from kdengine.models.prompts import imagenet_classnames

        return imagenet_classnames()
    names = _lines(path, "class names")
    blank = [number for number, name in enumerate(names) if not name]
    if blank or not names:
        raise ValueError(
            f"class names {path}: one name a line, line number = class; "
            f"{f'line {blank[0] + 1} is blank' if blank else 'the file is empty'}"
        )
    return names


def read_templates(path: str) -> list[str]:
    """Prompt templates, one a line, ``{}`` or ``{c}`` for the name; ``imagenet`` for OpenAI's 80.

    A text with a place for the name is a template itself, and no file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there is none, a line lacks the place of the name, or the file is no UTF-8.
    """
    if path == IMAGENET:
        from kdengine.models.prompts import imagenet_templates

        return imagenet_templates()
    if any(place in path for place in PLACES):
        return [path]
    templates = [line for line in _lines(path, "templates") if line]
    for template in templates:
        _place(template, path)
    if not templates:
        raise ValueError(f"templates {path}: expected one template a line, the file is empty")
    return templates


def fill(template: str, name: str) -> str:
    """The template with the class name in its place; other braces mean nothing."""
    return template.replace(_place(template, "fill"), name)


def _lines(path: str, what: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise FileNotFoundError(
            f"{what}: cannot read {path} ({error.strerror}); give the path of a text file, or the "
            f"word {IMAGENET}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path}: expected UTF-8, got {error}; convert the file") from None


def _place(template: str, source: str) -> str:
    for place in PLACES:
        if place in template:
            return place
    raise ValueError(
        f"templates ({source}): expected {{}} or {{c}} where the class name goes, got {template!r}"
    )
