# SPDX-License-Identifier: Apache-2.0
"""Data sets below a folder in CLIP_benchmark's local layout, and what each lacks.

A set is a folder with

* ``classnames.txt``, a name a line, and ``zeroshot_classification_templates.txt``, a prompt with
  ``{c}`` a line;
* ``test/``, with ``nshards.txt``, the number of shards, and these, ``0.tar``, ``1.tar``, ...: of
  images and `.cls`;
* ``train/``, likewise, where it has a training part;
* ``dataset_type.txt``, where it is no classification: ``retrieval``, ``multilabel`` or another.

A folder that has one of these, or a name as its sets are published, ``wds_...``, is meant as a set.
"""

import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from kdengine.data.progress import counted
from kdengine.evaluate.sets import EvalSet

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
COUNT, KIND = "nshards.txt", "dataset_type.txt"
CLASSIFICATION = "classification"
PREFIX = "wds_"
MARKS = (CLASSNAMES, TEMPLATES, f"test/{COUNT}", f"train/{COUNT}")
EXPECTED = f"test/{COUNT}, test/0.tar, ..., {CLASSNAMES}, {TEMPLATES}"
# ROOT/wds/vtab/cifar10 is three
DEPTH = 4
ZEROSHOT, PROBE = "zeroshot_classification", "linear_probe"
TASKS = {ZEROSHOT: "zero-shot", PROBE: "linear probe"}
"""CLIP_benchmark's names of the tasks, and ours for people."""

# whose classes are uneven; CLIP's paper, VTAB and DataComp average over classes
PER_CLASS = {
    *("caltech101", "fgvcaircraft", "aircraft", "pets", "oxfordpets", "oxfordiiitpet"),
    *("flowers", "flowers102", "oxfordflowers", "oxfordflowers102"),
}


@dataclass(frozen=True)
class LocalSet:
    """A data set of CLIP_benchmark's layout.

    Attributes:
        name: as CLIP_benchmark calls it, without ``wds/``: ``vtab/cifar10``.
        folder: where it is.
        tasks: what to evaluate, by CLIP_benchmark's names.
        faults: what is missing for a task, likewise.
        left_out: why nothing of a set that is no classification is evaluated; else empty.
    """

    name: str
    folder: Path
    tasks: dict[str, EvalSet] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    left_out: str = ""

    @property
    def by_class(self) -> bool:
        """Whether the mean over classes of their recall is the number that papers print."""
        last = self.name.rpartition("/")[2].lower()
        return re.sub("[^a-z0-9]", "", last) in PER_CLASS


def find_sets(root: str | Path) -> list[LocalSet]:
    """All data sets below a folder, or the folder itself where it is one; sorted by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no set in it, or two of the same name.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise FileNotFoundError(f"eval: --folder {root} {what}; expected a folder of data sets")
    found: dict[str, LocalSet] = {}
    for folder in _folders(top):
        one = _read(folder, set_name(folder, top))
        if one.name in found:
            raise ValueError(
                f"eval: --folder {root}: both {found[one.name].folder} and {folder} are the set "
                f"{one.name}; rename one, or move it out of the folder"
            )
        found[one.name] = one
    if not found:
        raise ValueError(
            f"eval: --folder {root} holds no data set in CLIP_benchmark's layout, up to {DEPTH} "
            f"folders deep; expected a folder for each set, with {EXPECTED}; found {_content(top)}"
        )
    return [found[name] for name in sorted(found)]


def set_name(folder: Path, root: Path) -> str:
    """The name of a set by its place below a root, as CLIP_benchmark writes it without ``wds/``.

    ``wds_vtab-cifar10``, as its sets are published, ``wds_vtab-cifar10_test``, as DataComp's, and
    ``wds/vtab/cifar10`` are all ``vtab/cifar10``.
    """
    parts = folder.relative_to(root).parts or (folder.resolve().name,)
    if parts[-1].startswith(PREFIX):
        name = parts[-1].removeprefix(PREFIX).removesuffix("_test")
    else:
        name = "/".join(parts).removeprefix("wds/")
    return re.sub("^(vtab|wilds)-", r"\1/", name)


def _folders(top: Path) -> list[Path]:
    """The sets in a folder, whole or broken; what is inside a set with a mark is none.

    Each folder is visited once; links are followed last, so that a set is named by its own place.
    ``top``, ``wds_all`` and ``test`` may also hold sets; a set is made of them only where they hold
    none.
    """
    sets: list[Path] = []
    # where a set must not be, if the folder is to be one
    doubtful: dict[Path, Path] = {}
    seen: set[str] = set()
    plain, links = deque([top]), deque[Path]()
    while plain or links:
        folder = (plain or links).popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        if any((folder / mark).is_file() for mark in MARKS):
            sets.append(folder)
            continue
        test = folder / "test"
        sure = (folder / KIND).is_file() or _tars(test) or _tars(folder / "train")
        if sure and folder != top:
            sets.append(folder)
        elif sure or test.is_dir():
            doubtful[folder] = folder if folder == top else test
        elif folder.name.startswith(PREFIX) and folder != top:
            doubtful[folder] = folder
        if len(folder.relative_to(top).parts) < DEPTH:
            for inner in _inner(folder):
                (links if inner.is_symlink() else plain).append(inner)
    known = [*sets, *doubtful]
    for folder, place in doubtful.items():
        if not any(other != folder and other.is_relative_to(place) for other in known):
            sets.append(folder)
    return sorted(sets)


def _tars(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def _inner(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        # a link to itself is no folder
        names = [one.name for one in entries if one.name[0] != "." and os.path.isdir(one)]
    return [folder / name for name in sorted(names)]


def _read(folder: Path, name: str) -> LocalSet:
    """What can be evaluated of a set, and what it lacks."""
    one = LocalSet(name, folder)
    kind = folder / KIND
    told = " ".join(_text(kind).lower().split()) if kind.is_file() else ""
    if told not in ("", CLASSIFICATION):
        left_out = f"not evaluated: {KIND} says {told[:40]}, and only classification is evaluated"
        return LocalSet(name, folder, left_out=left_out)
    # the name of an evaluation set has no slash
    plain = re.sub(r"[^\w.-]+", "-", name)
    names, templates = folder / CLASSNAMES, folder / TEMPLATES
    absent = [str(path) for path in (names, templates) if not path.is_file()]
    missing = [f"{' and '.join(absent)}: missing"] if absent else []
    try:
        test = _shards(folder, "test")
    except ValueError as error:
        one.faults[ZEROSHOT] = "; ".join([str(error), *missing])
        return one
    if missing:
        one.faults[ZEROSHOT] = missing[0]
    else:
        one.tasks[ZEROSHOT] = EvalSet(
            name=plain,
            shards=test,
            kind="zeroshot",
            classnames=str(names),
            templates=str(templates),
        )
    if (folder / "train").is_dir():
        try:
            train = _shards(folder, "train")
            one.tasks[PROBE] = EvalSet(name=plain, shards=train, test=test, kind="probe")
        except ValueError as error:
            one.faults[PROBE] = str(error)
    return one


def _shards(folder: Path, part: str) -> str:
    """The shards of a part, checked against their number.

    Raises:
        ValueError: what is missing, or does not fit.
    """
    count = folder / part / COUNT
    if not count.parent.is_dir():
        raise ValueError(f"the folder {count.parent} is missing")
    there = _tars(count.parent)
    if not count.is_file():
        raise ValueError(f"{count} is missing, the number of shards ({len(there)} are there)")
    said = _text(count)
    if not re.fullmatch("0*[1-9][0-9]{0,5}", said):
        raise ValueError(f"{count}: expected the number of shards, got {said[:40]!r}")
    num = int(said)
    expected = {f"{number}.tar" for number in range(num)}
    if missing := sorted(expected - there, key=_number):
        raise ValueError(
            f"{count} says {counted(num, 'shard')}, {len(missing)} of them missing: "
            f"{count.parent / missing[0]}{' and others' if missing[1:] else ''}"
        )
    if more := sorted(there - expected):
        raise ValueError(f"{count} says {counted(num, 'shard')}, but there is also {more[0]}")
    return f"{count.parent}/{{0..{num - 1}}}.tar" if num > 1 else f"{count.parent}/0.tar"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _number(name: str) -> int:
    return int(name.removesuffix(".tar"))


def _content(folder: Path) -> str:
    """What a folder holds, in words."""
    inner = [path.name for path in _inner(folder)]
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    told = [
        f"{counted(len(names), noun)} ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
        for names, noun in ((inner, "folder"), (files, "file"))
        if names
    ]
    return " and ".join(told) or "nothing"
