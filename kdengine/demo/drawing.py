# SPDX-License-Identifier: Apache-2.0
"""Drawing a scene as a small JPEG; equal random states give equal bytes."""

import io
import math
import random

from PIL import Image, ImageDraw

from kdengine.demo.scenes import Scene

Colour = tuple[int, int, int]
Point = tuple[float, float]

IMAGE_SIZE = 64
SUPERSAMPLING = 4
JPEG_QUALITY = 90
MARGIN = 0.04

PAINTS: dict[str, Colour] = {
    "red": (222, 45, 38),
    "yellow": (250, 204, 21),
    "green": (34, 150, 66),
    "blue": (37, 99, 225),
    "purple": (126, 48, 176),
    "pink": (246, 114, 182),
    "black": (32, 32, 36),
    "white": (252, 252, 252),
}
GROUNDS: dict[str, Colour] = {
    "grey": (196, 200, 205),
    "rose": (238, 205, 200),
    "mint": (196, 226, 205),
    "sky": (195, 216, 240),
    "sand": (234, 220, 184),
}
# half of the width of a thing, as a fraction of the picture's
RADII = {"small": (0.155, 0.165), "large": (0.215, 0.23)}
CENTRES: dict[str, Point] = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}


def render(scene: Scene, rng: random.Random) -> bytes:
    """Draw a scene as a JPEG of IMAGE_SIZE; place, size, angle and shade vary a little."""
    side = IMAGE_SIZE * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    _background(draw, scene, rng, side)
    for thing, (x, y) in zip(scene.things, _centres(scene, rng), strict=True):
        radius = rng.uniform(*RADII[thing.size]) * side
        # keep the whole thing inside the picture, also under a 0.9 crop
        low, high = radius + MARGIN * side, side - radius - MARGIN * side
        centre = (min(max(x * side, low), high), min(max(y * side, low), high))
        colour = _shade(PAINTS[thing.colour], rng.uniform(0.9, 1.06))
        _draw_shape(draw, thing.shape, centre, radius, math.radians(rng.uniform(-12, 12)), colour)
    buffer = io.BytesIO()
    image.reduce(SUPERSAMPLING).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _centres(scene: Scene, rng: random.Random) -> list[Point]:
    if len(scene.things) == 1:
        x, y = CENTRES[scene.position]
        return [(x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.07, 0.07))]
    along, across = rng.uniform(0.22, 0.27), rng.uniform(0.73, 0.78)
    near, far = 0.5 + rng.uniform(-0.17, 0.17), 0.5 + rng.uniform(-0.17, 0.17)
    first, second = (along, near), (across, far)
    if scene.position == "above":
        first, second = first[::-1], second[::-1]
    return [first, second]


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _background(draw: ImageDraw.ImageDraw, scene: Scene, rng: random.Random, side: int) -> None:
    base = _shade(GROUNDS[scene.tint], rng.uniform(0.96, 1.04))
    marked = _shade(base, 0.86)
    draw.rectangle((0, 0, side, side), fill=base)
    cell = side * rng.uniform(0.1, 0.14)
    offset_x, offset_y = rng.uniform(0, cell), rng.uniform(0, cell)
    count = int(side / cell) + 3
    if scene.pattern == "striped":
        for i in range(-count, count, 2):
            x = i * cell + offset_x
            draw.polygon(
                ((x, 0), (x + cell, 0), (x + cell + side, side), (x + side, side)), fill=marked
            )
    for i in range(-1, count):
        for j in range(-1, count):
            x, y = i * cell + offset_x, j * cell + offset_y
            if scene.pattern == "checkered" and (i + j) % 2:
                draw.rectangle((x, y, x + cell, y + cell), fill=marked)
            if scene.pattern == "dotted":
                radius = 0.27 * cell
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=marked)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: Point,
    radius: float,
    angle: float,
    colour: Colour,
) -> None:
    cos, sin = math.cos(angle), math.sin(angle)
    points = [
        (
            centre[0] + radius * (x * cos - y * sin),
            centre[1] + radius * (x * sin + y * cos),
        )
        for x, y in OUTLINES[shape]
    ]
    edge = _shade(colour, 0.62) if max(colour) < 240 or min(colour) < 200 else (120, 120, 128)
    draw.polygon(points, fill=colour)
    loops = [points]
    if shape == "ring":
        # outside and inside are one polygon: its seam is painted over and has no outline
        draw.line([points[0], points[-1]], fill=colour, width=2)
        loops = [points[: len(points) // 2], points[len(points) // 2 :]]
    for loop in loops:
        draw.line([*loop, loop[0]], fill=edge, width=SUPERSAMPLING, joint="curve")


def _arc(radius: float, start: float, end: float, x: float = 0.0, y: float = 0.0) -> list[Point]:
    angles = [math.radians(start + (end - start) * k / 40) for k in range(41)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _spikes(count: int, inner: float) -> list[Point]:
    radii = [inner if k % 2 else 1.0 for k in range(2 * count)]
    turns = [math.pi * (k / count - 0.5) for k in range(2 * count)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _heart() -> list[Point]:
    turns = [2 * math.pi * k / 48 for k in range(48)]
    heights = [
        13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        for t in turns
    ]
    return [(math.sin(t) ** 3, -h / 16) for t, h in zip(turns, heights, strict=True)]


# corners in the unit circle, y downwards
OUTLINES: dict[str, list[Point]] = {
    "circle": _arc(0.95, 0, 360),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "star": _spikes(5, 0.42),
    "heart": _heart(),
    "cross": [
        (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36),
        (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36),
    ],
    "ring": _arc(1.0, 0, 360) + _arc(0.52, 360, 0),
    "moon": _arc(1.0, 52, 308) + _arc(0.84, 249, 111, 0.55),
    "arrow": [
        (-1.0, -0.3), (0.1, -0.3), (0.1, -0.85), (1.0, 0.0),
        (0.1, 0.85), (0.1, 0.3), (-1.0, 0.3),
    ],
    "tree": [
        (0.0, -1.0), (0.55, -0.3), (0.3, -0.3), (0.85, 0.5), (0.2, 0.5),
        (0.2, 1.0), (-0.2, 1.0), (-0.2, 0.5), (-0.85, 0.5), (-0.3, -0.3), (-0.55, -0.3),
    ],
}  # fmt: skip
