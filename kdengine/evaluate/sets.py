# SPDX-License-Identifier: Apache-2.0
"""Which data sets to evaluate on, and how the configuration writes them."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kdengine.data.shards import existing
from kdengine.data.split import PARTS, Split, read_split
from kdengine.evaluate.prompts import IMAGENET, read_classnames, read_templates

# of sets with a split file that name no templates
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A data set to evaluate on.

    Attributes:
        name: prefix of its metrics.
        shards: as for training data; for zero-shot and probe also a folder of class folders.
        kind: ``retrieval`` uses the captions, ``zeroshot`` and ``probe`` the ``.cls`` members or
            the class folders.
        test: what a probe is scored on, while it is fitted on ``shards``; probes only.
        classnames: file of class names, or ``imagenet``; or a split file (``.json``), which also
            says which images; zero-shot sets only.
        templates: file of prompt templates, ``imagenet``, or a template; zero-shot sets only.
        part: which list of the split file is evaluated.
    """

    name: str
    shards: str
    kind: Literal["retrieval", "zeroshot", "probe"]
    test: str | None = None
    classnames: str | None = None
    templates: str | None = None
    part: str = "test"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"evaluation set: a name is made of letters, digits, '.', '_' and '-', got "
                f"{self.name!r}"
            )
        if not self.shards:
            raise ValueError(f"evaluation set {self.name}: expected shards, got nothing")
        if self.kind == "zeroshot" and not (self.classnames and self.templates):
            raise ValueError(
                f"evaluation set {self.name}: zero-shot classification needs class names and "
                f"templates; give both files, or the word {IMAGENET}"
            )
        if (self.kind == "probe") != bool(self.test):
            raise ValueError(
                f"evaluation set {self.name}: a linear probe, and nothing else, needs a part to "
                f"test on; got kind {self.kind!r} and test {self.test!r}"
            )

    @property
    def has_split(self) -> bool:
        """Whether a split file says which images there are, and of which classes."""
        return bool(self.classnames) and str(self.classnames).endswith(".json")

    def read_split(self) -> Split:
        """The split file."""
        return read_split(str(self.classnames))

    def read_classnames(self) -> list[str]:
        """The class names; empty for retrieval."""
        if self.has_split:
            return self.read_split().classes
        return read_classnames(self.classnames) if self.classnames else []

    def read_templates(self) -> list[str]:
        """The prompt templates; empty for retrieval."""
        return read_templates(self.templates) if self.templates else []

    def parts(self) -> tuple[str, ...]:
        """What to open: the shards, and for a probe the test part."""
        return (self.shards,) if self.test is None else (self.shards, self.test)

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Put this set's name before the message of whatever is raised inside."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            # the same error goes on, so that its kind and the place it came from stay known
            if len(error.args) == 1:
                error.args = (f"evaluation set {self.name}: {error}",)
            raise


def parse_eval_sets(
    retrieval: Sequence[str], zeroshot: Sequence[str], probe: Sequence[str] = ()
) -> list[EvalSet]:
    """Read the words of the configuration.

    Retrieval takes ``NAME=SHARDS``, zero-shot ``NAME=SHARDS;CLASSNAMES;TEMPLATES``, a linear probe
    ``NAME=TRAIN;TEST``. Without class names and templates, ``X-zeroshot.tar`` (also
    ``X-zeroshot-{000..009}.tar``) takes ``X-classnames.txt`` and ``X-templates.txt`` beside it.
    ``NAME=SHARDS;SPLIT.json`` evaluates the list ``test`` of a split file, and
    ``NAME=SHARDS;SPLIT.json:val`` another one; without templates classes are called by
    ``a photo of a {}.``

    Raises:
        ValueError: a malformed word, a name that occurs twice, or no files to be found.
        FileNotFoundError: the class names or templates do not exist.
    """
    sets = [EvalSet(name=n, shards=s, kind="retrieval") for n, s in map(_split, retrieval)]
    for word in zeroshot:
        name, rest = _split(word)
        shards, *files = (part.strip() for part in rest.split(";"))
        part = "test"
        if files and (found := re.fullmatch(r"(.*\.json)(?::(\w+))?", files[0])):
            part = found[2] or part
            files = [found[1], *(files[1:] or [TEMPLATE])]
            if part not in PARTS:
                raise ValueError(
                    f"evaluation set {name}: a split file has the lists {', '.join(PARTS)}; "
                    f"{part!r} came"
                )
        if not files:
            files = _files_beside(name, shards)
        if len(files) != 2:
            raise ValueError(
                f"evaluation set {name}: expected 'NAME=SHARDS;CLASSNAMES;TEMPLATES', got {word!r}"
            )
        one = EvalSet(
            name=name,
            shards=shards,
            kind="zeroshot",
            classnames=files[0],
            templates=files[1],
            part=part,
        )
        with one.named_in_errors():
            one.read_classnames()
            one.read_templates()
        sets.append(one)
    for word in probe:
        name, rest = _split(word)
        train, *test = (part.strip() for part in rest.split(";"))
        if len(test) != 1 or not test[0]:
            raise ValueError(f"evaluation set {name}: expected 'NAME=TRAIN;TEST', got {word!r}")
        sets.append(EvalSet(name=name, shards=train, test=test[0], kind="probe"))
    names = [one.name for one in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"evaluation sets: names must differ; given twice: {sorted(twice)}")
    return sets


def _files_beside(name: str, shards: str) -> list[str]:
    """The files of class names and templates of X-zeroshot.tar."""
    found = re.fullmatch(r"(.*)-zeroshot[^/]*", shards)
    files = [f"{found[1]}-{kind}.txt" for kind in ("classnames", "templates")] if found else []
    if not files or not os.path.exists(files[0]):
        # a mistyped path is the nearer cause
        with EvalSet(name=name, shards=shards, kind="retrieval").named_in_errors():
            existing(shards)
    if not files:
        raise ValueError(
            f"evaluation set {name}: expected the files of its class names and templates, as in "
            f"'NAME=SHARDS;CLASSNAMES;TEMPLATES', or shards named X-zeroshot.tar with "
            f"X-classnames.txt and X-templates.txt beside them; got {shards!r}"
        )
    return files


def _split(word: str) -> tuple[str, str]:
    name, equals, rest = word.partition("=")
    if not equals or not name.strip() or not rest.strip() or "/" in name:
        raise ValueError(f"evaluation set: expected 'NAME=SHARDS', got {word!r}")
    return name.strip(), rest.strip()
