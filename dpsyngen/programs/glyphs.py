"""Characters of freely licensed fonts: knowledge that the private images show signs or writing (tier 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program
from dpsyngen.programs.checks import as_choice, as_number, as_range
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import below, unit32, words32
from dpsyngen.programs.drawing.fonts import choose_fonts, outlines
from dpsyngen.programs.drawing.grounds import GROUNDS, ground_colour, ink_colour
from dpsyngen.programs.drawing.portable import cos_sin
from dpsyngen.programs.drawing.raster import add_edge, blend, close_polygon, plain, to_levels
from dpsyngen.programs.registry import register

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_LAW = np.uint64(0x676C7970)  # "glyp"


@register("glyphs")
@dataclass(frozen=True, kw_only=True)
class Glyphs(Program):
    """One character of a random font on plain ground, turned, slanted, stretched and shifted; anti-aliased.

    `params` gives ``character``, ``font``, ``turn`` in degrees and ``height`` as a fraction of the resolution.

    Attributes:
        characters: what to draw from, evenly.
        fonts: names of fonts, or None for all freely licensed ones found here.  They are kept with the hash of their
            file, so a configuration made on one machine is refused on another that has other outlines by that name.
        height: range of the larger side of a character as a fraction of the resolution, uniform; 0.1 to 1.
        turn: largest turn in degrees, uniform to both sides; 0 to 180.
        slant: largest shear, uniform to both sides; 0 to 1.
        stretch: largest ratio by which height and width change against each other; 1 to 3.
        ground: "black", "white" or "random"; the ink stands out from it by 64 levels or more.

    Raises:
        ConfigError: a parameter is not allowed, or there is no such font.
    """

    prior_tier: ClassVar[int] = 2

    characters: str = CHARACTERS
    fonts: Any = None
    height: Any = (0.5, 0.8)
    turn: float = 15.0
    slant: float = 0.25
    stretch: float = 1.25
    ground: str = "black"

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = object.__setattr__
        text = self.characters
        if not isinstance(text, str) or not text or not text.isprintable() or " " in text:
            raise ConfigError(f"characters={text!r} cannot be drawn: give visible characters such as 0123456789.")
        fix(self, "characters", "".join(dict.fromkeys(text)))
        fix(self, "fonts", choose_fonts(self.fonts, self.characters))
        fix(self, "height", as_range("height", self.height, 0.1, 1.0))
        fix(self, "turn", as_number("turn", self.turn, 0.0, 180.0))
        fix(self, "slant", as_number("slant", self.slant, 0.0, 1.0))
        fix(self, "stretch", as_number("stretch", self.stretch, 1.0, 3.0))
        as_choice("ground", self.ground, GROUNDS, "a ground")

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        shapes = outlines(self.fonts, self.characters)
        law = *self.height, self.turn / 360.0, self.slant, self.stretch
        ground = GROUNDS.index(self.ground)
        draw(indices, np.uint64(self.seed), shapes.points, shapes.contours, shapes.glyphs, *law, ground, out)

    def _params(self, index: int) -> dict[str, Any]:
        glyph, height, turns, _, _, _, _ = place(
            np.uint64(self.seed),
            np.uint64(index),
            len(self.fonts) * len(self.characters),
            *self.height,
            self.turn / 360.0,
            self.slant,
            self.stretch,
        )
        font, character = divmod(int(glyph), len(self.characters))
        return {
            "character": self.characters[character],
            "font": self.fonts[font],
            "turn": 360.0 * turns,
            "height": height,
        }


@compiled
def place(
    seed: np.uint64, index: np.uint64, glyphs: int, low: float, high: float, turn: float, slant: float, stretch: float
) -> tuple[int, float, float, float, float, float, float]:
    """Which glyph, its height, turns, shear, stretch across, and where in the room left it lies (two shares)."""
    a, b, c, d = words32(seed, _LAW, index, np.uint64(0))
    e, f, g, _ = words32(seed, _LAW, index, np.uint64(1))
    across = 1.0 + unit32(e) * (stretch - 1.0)
    if e & np.uint64(1):
        across = 1.0 / across
    turns = turn * (2.0 * unit32(c) - 1.0)
    shear = slant * (2.0 * unit32(d) - 1.0)
    return below(a, glyphs), low + unit32(b) * (high - low), turns, shear, across, unit32(f), unit32(g)


@compiled
def draw(
    indices: NDArray[np.uint64],
    seed: np.uint64,
    points: NDArray[np.float64],
    contours: NDArray[np.int64],
    glyphs: NDArray[np.int64],
    low: float,
    high: float,
    turn: float,
    slant: float,
    stretch: float,
    ground: int,
    out: NDArray[np.uint8],
) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    size = out.shape[2]
    grey = out.shape[1] == 1
    canvas = np.empty((out.shape[1], size, size))
    cover = np.empty((size, size))
    area = np.zeros((size, size + 1))
    behind = np.empty(3)
    ink = np.empty(3)
    moved = np.empty_like(points)
    for n in range(indices.shape[0]):
        glyph, height, turns, shear, across, right, down = place(
            seed, indices[n], glyphs.shape[0] - 1, low, high, turn, slant, stretch
        )
        cos, sin = cos_sin(turns)
        first = contours[glyphs[glyph]]
        stop = contours[glyphs[glyph + 1]]
        x_low, x_high, y_low, y_high = math.inf, -math.inf, math.inf, -math.inf
        for p in range(first, stop):
            x = across * points[p, 0] + shear * points[p, 1]
            y = points[p, 1]
            moved[p, 0] = cos * x - sin * y
            moved[p, 1] = sin * x + cos * y
            x_low = min(x_low, moved[p, 0])
            x_high = max(x_high, moved[p, 0])
            y_low = min(y_low, moved[p, 1])
            y_high = max(y_high, moved[p, 1])
        scale = height * size / max(max(x_high - x_low, y_high - y_low), 1e-9)
        left = right * (size - scale * (x_high - x_low)) - scale * x_low
        top = down * (size - scale * (y_high - y_low)) - scale * y_low
        for k in range(glyphs[glyph], glyphs[glyph + 1]):
            for p in range(contours[k], contours[k + 1]):
                q = p + 1 if p + 1 < contours[k + 1] else contours[k]
                add_edge(
                    area,
                    left + scale * moved[p, 0],
                    top + scale * moved[p, 1],
                    left + scale * moved[q, 0],
                    top + scale * moved[q, 1],
                )
        close_polygon(area, cover)
        ground_colour(seed, indices[n], ground, grey, behind)
        ink_colour(seed, indices[n], 0, grey, behind, ink)
        plain(canvas, behind)
        blend(canvas, cover, ink)
        to_levels(canvas, out[n])
