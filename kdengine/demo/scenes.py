# SPDX-License-Identifier: Apache-2.0
"""Scenes of coloured shapes: what is in a picture, and how people describe it.

A scene is one or two things (colour, shape, size) on a patterned background. Two things stand in a
relation, a single one has a place. Everything follows from a ``random.Random``.
"""

import random
from dataclasses import dataclass, replace

COLOURS = ("red", "yellow", "green", "blue", "purple", "pink", "black", "white")
SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "arrow", "tree",
)  # fmt: skip
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PATTERNS = ("plain", "striped", "dotted", "checkered")
TINTS = ("grey", "rose", "mint", "sky", "sand")
RELATIONS = {"left of": "right of", "above": "below"}
PLACES = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
TEMPLATES = ("a {}", "there is a {}", "a picture of a {}")

Combination = tuple[str, str]
COMBINATIONS: tuple[Combination, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
# diagonals of the colour x shape table: training sees each colour with three quarters of the shapes
# and each shape with three quarters of the colours
HELD_OUT: tuple[Combination, ...] = tuple(
    (colour, shape)
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
    if (i + j) % 4 == 0
)
SEEN: tuple[Combination, ...] = tuple(c for c in COMBINATIONS if c not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """A shape with its colour and size."""

    colour: str
    shape: str
    size: str

    @property
    def combination(self) -> Combination:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows; ``position`` is a relation of two things or the place of one."""

    things: tuple[Thing, ...]
    position: str
    pattern: str
    tint: str

    @property
    def described(self) -> tuple[tuple[Thing, ...], str, str]:
        """All that a full caption tells: everything but the tint."""
        return self.things, self.position, self.pattern


def sample_scene(
    rng: random.Random, combinations: tuple[Combination, ...], num_things: int
) -> Scene:
    """Draw a scene whose things all come from ``combinations``."""
    pairs = rng.sample(combinations, num_things)
    things = tuple(Thing(colour, shape, rng.choice(list(SIZES))) for colour, shape in pairs)
    position = rng.choice(list(RELATIONS) if num_things == 2 else PLACES)
    return Scene(things, position, rng.choice(PATTERNS), rng.choice(TINTS))


def sample_family(rng: random.Random, size: int) -> list[Scene]:
    """Draw ``size`` scenes that differ from the first in one to three details, mostly shapes."""
    first = sample_scene(rng, COMBINATIONS, 2)
    family = {first.described: first}
    while len(family) < size:
        scene = replace(first, tint=rng.choice(TINTS))
        for _ in range(rng.randint(1, 3)):
            scene = _change_detail(scene, rng)
        if len(set(scene.things)) == 2:
            family.setdefault(scene.described, scene)
    return list(family.values())


def _change_detail(scene: Scene, rng: random.Random) -> Scene:
    detail = rng.choice(("shape", "shape", "shape", "size", "pattern"))
    if detail == "pattern":
        return replace(scene, pattern=rng.choice(PATTERNS))
    things = list(scene.things)
    which = rng.randrange(len(things))
    if detail == "shape":
        things[which] = replace(things[which], shape=rng.choice(SHAPES))
    else:
        things[which] = replace(things[which], size=rng.choice(list(SIZES)))
    return replace(scene, things=tuple(things))


def describe(scene: Scene, rng: random.Random, num_captions: int, *, full: bool) -> list[str]:
    """Captions of a scene: the first names everything in fixed words, the others vary.

    With ``full`` every caption names everything but the tint, so that scenes that differ in
    anything else have captions that differ; without it the others leave out details, as people do.
    """
    captions = [_sentence(scene, None, True)]
    while len(captions) < num_captions:
        caption = _sentence(scene, rng, full)
        if caption not in captions:
            captions.append(caption)
    return captions


def _name(thing: Thing, rng: random.Random | None, full: bool) -> str:
    size = rng.choice(SIZES[thing.size]) if rng else thing.size
    words = [size, thing.colour, thing.shape]
    if rng and not full:
        if rng.random() < 0.5:
            words.remove(size)
        if rng.random() < 0.4:
            words.remove(thing.colour)
        elif rng.random() < 0.15:
            words[-1] = "shape"
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _sentence(scene: Scene, rng: random.Random | None, full: bool) -> str:
    def pick(*options: str) -> str:
        return rng.choice(options) if rng else options[0]

    names = [_name(thing, rng, full) for thing in scene.things]
    if rng and not full and rng.random() < 0.4:
        content = " and ".join(names if rng.random() < 0.5 else names[::-1])
    elif len(names) == 1:
        content = f"{names[0]} {scene.position}"
    else:
        relation = scene.position
        if rng and rng.random() < 0.5:
            names, relation = names[::-1], RELATIONS[relation]
        to_the = f"to the {relation}" if relation.endswith(" of") else relation
        content = f"{names[0]} {pick(relation, to_the)} {names[1]}"
    if rng and not full and rng.random() < 0.4:
        return pick("{}", "there is {}", "a picture of {}").format(content)
    ground = f"a {scene.pattern} background"
    return pick(
        f"{content} on {ground}",
        f"{content} in front of {ground}",
        f"on {ground}, {content}",
        f"there is {content} on {ground}",
        f"a picture of {content}, with {ground}",
    )
