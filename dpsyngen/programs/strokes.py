"""Strokes: a few curved lines on plain ground, like those of a pen that knows no alphabet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_choice, as_counts, as_number, as_range, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.colours import GROUNDS, ground_colour, ink_colour
from dpsyngen.programs.drawing.counter_rng import below, fill_uniform, words32
from dpsyngen.programs.drawing.portable import compiled, exp2, log2
from dpsyngen.programs.drawing.raster import add_segment, blend, to_levels
from dpsyngen.programs.registry import register

MAX_STROKES = 16
_PIECES = 20  # straight pieces to a curve

_LAW = np.uint64(0x7374726F)  # "stro"


@register("strokes")
@dataclass(frozen=True, kw_only=True)
class Strokes(Program):
    """Cubic Bézier curves with round ends and a width that changes along them, anti-aliased, in one ink.

    Attributes:
        strokes: range of their number, 1 to 16, evenly.
        width: range of the width as a fraction of the resolution, log-uniform; 0.005 to 0.5.
        margin: the control points are uniform in the image less this margin, a fraction of the resolution; 0 to 0.45.
        ground: "black", "white" or "random"; the ink stands out from it by 64 levels or more.
    """

    prior_tier: ClassVar[int] = 1

    strokes: Any = param((1, 4), as_counts, 1, MAX_STROKES)
    width: Any = param((0.04, 0.14), as_range, 0.005, 0.5)
    margin: float = param(0.1, as_number, 0.0, 0.45)
    ground: str = param("black", as_choice, GROUNDS)

    def _law(self) -> Law:
        return self.strokes, self.width, self.margin

    def _draw(self, indices: Words, out: Images) -> None:
        draw(indices, np.uint64(self.seed), self._law(), GROUNDS.index(self.ground), out)


@compiled
def draw_curves(seed: Word, index: Word, law: Law, size: int) -> Floats:
    """Draw the strokes of an image, a row each: (x, y) four times and the half-widths at both ends, in pixels."""
    (low, high), (thin, thick), margin = law
    w, _, _, _ = words32(seed, _LAW, index, np.uint64(0))
    values = np.empty((low + below(w, high - low + 1), 10))
    ratio = log2(thick / thin)
    for k in range(len(values)):  # three blocks of four numbers for each stroke
        row = values[k]
        fill_uniform(seed, _LAW, index, np.uint64(1 + 3 * k), row)
        for p in range(8):
            row[p] = size * (margin + (1.0 - 2.0 * margin) * row[p])
        for p in range(8, 10):
            row[p] = 0.5 * size * thin * exp2(row[p] * ratio)
    return values


@compiled
def add_curve(cover: Floats, row: Floats) -> None:
    """Add one stroke to a cover."""
    x, y, half = row[0], row[1], row[8]
    for piece in range(1, _PIECES + 1):
        t = piece / _PIECES
        s = 1.0 - t
        a, b, c, d = s * s * s, 3.0 * s * s * t, 3.0 * s * t * t, t * t * t  # Bernstein's polynomials
        x_next = a * row[0] + b * row[2] + c * row[4] + d * row[6]
        y_next = a * row[1] + b * row[3] + c * row[5] + d * row[7]
        half_next = row[8] + t * (row[9] - row[8])
        add_segment(cover, x, y, x_next, y_next, half, half_next)
        x, y, half = x_next, y_next, half_next


@compiled
def draw(indices: Words, seed: Word, law: Law, ground: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    size = out.shape[2]
    grey = out.shape[1] == 1
    canvas = np.empty((out.shape[1], size, size))
    cover = np.empty((size, size))
    for n in range(indices.shape[0]):
        behind = ground_colour(seed, indices[n], ground, grey)
        ink = ink_colour(seed, indices[n], 0, grey, behind)
        for c in range(out.shape[1]):
            canvas[c] = behind[c]
        cover[:] = 0.0
        for row in draw_curves(seed, indices[n], law, size):
            add_curve(cover, row)
        blend(canvas, cover, ink)
        to_levels(canvas, out[n])
