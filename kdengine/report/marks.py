# SPDX-License-Identifier: Apache-2.0
"""How a run is told from the others, by its position: a colour, and every seven runs another style.

The first seven differ in colour alone. A style is a dash pattern of lines and a shape of dots.
"""

from typing import Any

from kdengine.report.markup import Html, tag

# Okabe and Ito: told apart with every kind of colour vision; yellow is too pale for lines
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
# lengths of dash and gap in widths of the line; matplotlib's name of the dot, and the page's
STYLES: tuple[tuple[tuple[float, ...], str, str], ...] = (
    ((), "o", "circle"),
    ((5, 2), "s", "square"),
    ((1.5, 1.5), "^", "triangle"),
    ((6, 1.5, 1.5, 1.5), "v", "wedge"),
)
# width of a line in a key, and of the key, in its own units
WIDTH, LENGTH = 2, 28


def colour(number: int) -> str:
    """The colour of a run."""
    return PALETTE[number % len(PALETTE)]


def _style(number: int) -> tuple[tuple[float, ...], str, str]:
    return STYLES[number // len(PALETTE) % len(STYLES)]


def dashes(number: int) -> Any:
    """The line style of a run, for matplotlib."""
    pattern = _style(number)[0]
    return (0, pattern) if pattern else "solid"


def dot(number: int) -> str:
    """The marker of a run, for matplotlib."""
    return _style(number)[1]


def swatch(number: int) -> Html:
    """A spot in colour and shape of a run."""
    shape = f"swatch {_style(number)[2]}"
    return tag("i", class_=shape, style=f"background:{colour(number)}")


def stroke(number: int) -> Html:
    """A piece of a line in colour and dashes of a run."""
    pattern = " ".join(f"{WIDTH * length:g}" for length in _style(number)[0])
    line = tag(
        "path",
        d=f"M0 4H{LENGTH}",
        stroke=colour(number),
        stroke_width=WIDTH,
        stroke_dasharray=pattern or None,
    )
    return tag("svg", line, class_="stroke", viewBox=f"0 0 {LENGTH} 8")
