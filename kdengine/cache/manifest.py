# SPDX-License-Identifier: Apache-2.0
"""What a cache holds and how it was made: its manifest, and whether it is that of a run's teachers.

A teacher is known by its configuration, preprocessing, tokenizer and the hash of its weights' file.
Where that file is at hand, a run's teacher is compared by content, so folders may move; a teacher
of open_clip's lists is compared by name and tag, without fetching it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdengine import LOCAL_DIR
from kdengine.data.progress import counted
from kdengine.models import TowerSpec
from kdengine.models.source import Source, resolve

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TeacherEntry:
    """One teacher of a cache.

    Attributes:
        spec: configuration, preprocessing and tokenizer.
        weights: sha256 of the file of its weights.
        scale: its exponentiated logit scale.
        precision: of its forward passes, fp32 or bf16.
    """

    spec: TowerSpec
    weights: str
    scale: float
    precision: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TeacherEntry:
        """The entry that ``dataclasses.asdict`` wrote."""
        return cls(**{**values, "spec": TowerSpec.from_dict(values["spec"])})

    def differences(self, model: str, tag: str | None) -> list[str]:
        """In what the teacher of these names is another one; may read the file of its weights."""
        source = _at_hand(model, tag)
        if source is not None and source.checkpoint is not None:
            found = spec_differences(self.spec, source.spec)
            if not found and self.weights != hash_file(source.checkpoint):
                found = [f"its weights are not those of {source.checkpoint}"]
            return found
        if is_named(self.spec, model, tag):
            return []
        theirs = " / ".join(filter(None, (self.spec.name, self.spec.pretrained)))
        return [f"its teacher is {theirs}, the run names {' / '.join(filter(None, (model, tag)))}"]


@dataclass(frozen=True)
class Manifest:
    """What is equal for all files of a cache.

    Attributes:
        teachers: in the order of the run's.
        views: stored views of each sample.
        storage: see ``codec``.
        seed: of the crops.
        crop_area: smallest and largest share of the image's area.
        crop_aspect: smallest and largest width / height.
    """

    teachers: tuple[TeacherEntry, ...]
    views: int
    storage: str
    seed: int
    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]

    @property
    def digest(self) -> str:
        """Equal for caches of the same teachers, crops and storage."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest in one step."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a cache.

        Raises:
            FileNotFoundError: the folder is not a cache.
            ValueError: its manifest is damaged or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"cache: {folder} is not a cache, it has no {MANIFEST}; make one with 'kdengine "
                f"cache --recipe RECIPE {folder}'"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if "command" in values:
                raise ValueError(f"it is that of a result of 'kdengine {values['command']}'")
            version = values.pop("format")
            if version != FORMAT:
                raise ValueError(f"it is of format {version}, this version reads {FORMAT}")
            values["teachers"] = tuple(map(TeacherEntry.from_dict, values["teachers"]))
            for name in ("crop_area", "crop_aspect"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cache: {path} cannot be used: {error}; make the cache anew in another folder"
            ) from None

    def differences(self, other: Manifest) -> list[str]:
        """What differs from another cache, in words."""
        found = []
        for field in dataclasses.fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here == there:
                continue
            if field.name != "teachers":
                found.append(f"{field.name} is {here}, not {there}")
            elif len(here) != len(there):
                found.append(f"it has {len(here)} teachers, not {len(there)}")
            else:
                for mine, theirs in zip(here, there, strict=True):
                    found += entry_differences(mine, theirs)
        return found


def entry_differences(mine: TeacherEntry, theirs: TeacherEntry) -> list[str]:
    """What tells two teachers apart, in words."""
    found = []
    name = mine.spec.name
    if mine.weights != theirs.weights:
        found.append(f"the weights of teacher {name} are others than those of {theirs.spec.name}")
    found += spec_differences(mine.spec, theirs.spec)
    if not found and mine.precision != theirs.precision:
        found.append(f"teacher {name} ran in {mine.precision}, not {theirs.precision}")
    if not found and mine.scale != theirs.scale:
        found.append(f"the scale of teacher {name} is {mine.scale:.4f}, not {theirs.scale:.4f}")
    return found


def spec_differences(mine: TowerSpec, theirs: TowerSpec) -> list[str]:
    """What tells two towers apart apart from their names, in words."""
    found = [
        f"{what} of teacher {mine.name} is {here}, not {there}"
        for what, here, there in (
            ("the size", mine.preprocess.size, theirs.preprocess.size),
            ("the tokenizer", mine.tokenizer, theirs.tokenizer),
            ("the width", mine.embed_dim, theirs.embed_dim),
        )
        if here != there
    ]
    if not found and mine.preprocess != theirs.preprocess:
        found.append(f"the preprocessing of teacher {mine.name} is {mine.preprocess}")
    if not found and _plain(mine.model_cfg) != _plain(theirs.model_cfg):
        found.append(f"teacher {mine.name} has another configuration than {theirs.name}")
    return found


def _plain(values: Any) -> Any:
    """As it would be after a trip through JSON."""
    return json.loads(json.dumps(values))


def hash_file(path: str) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_teachers(
    manifest: Manifest, named: Sequence[tuple[str, str | None]], precision: str = "auto"
) -> None:
    """Refuse a cache of other teachers than a run names; none named takes those of the cache.

    Args:
        manifest: of the cache.
        named: model and pretrained of each of the run's teachers.
        precision: of their forward passes; "auto" takes any.

    Raises:
        ValueError: naming what differs.
    """
    entries = manifest.teachers
    for entry in entries:
        if precision not in ("auto", entry.precision):
            raise ValueError(
                f"cache: teacher {entry.spec.name} ran in {entry.precision}, and the run asks for "
                f"{precision}; leave --distill.distill-precision away, or make a cache with it"
            )
    if not named:
        return
    remedy = (
        "give the run the cache's teachers, or none (--distill.distill-model with nothing behind "
        "it), or make a cache of the run's"
    )
    if len(named) != len(entries):
        raise ValueError(
            f"cache: the run names {counted(len(named), 'teacher')} and the cache holds "
            f"{len(entries)} ({', '.join(entry.spec.name for entry in entries)}); {remedy}"
        )
    for (model, tag), entry in zip(named, entries, strict=True):
        if found := entry.differences(model, tag):
            raise ValueError(f"cache: it is of another teacher: {'; '.join(found)}; {remedy}")


def is_named(spec: TowerSpec, model: str, pretrained: str | None) -> bool:
    """Whether these words of a configuration name the model of a spec."""
    # the names of open_clip's lists lose their slashes, those of folders and hubs do not
    names = (model, model.replace("/", "-"))
    return spec.name in names and spec.pretrained == (pretrained or None)


def _named(model: str, pretrained: str | None) -> str:
    return f"{model} / {pretrained}" if pretrained else model


def _at_hand(model: str, pretrained: str | None) -> Source | None:
    """A teacher whose files are on this machine, found without network."""
    local = model.startswith(LOCAL_DIR) and Path(model.removeprefix(LOCAL_DIR)).is_dir()
    if local or (pretrained and os.path.isfile(pretrained)):
        return resolve("teacher", model, pretrained)
    return None
