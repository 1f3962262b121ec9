"""Perlin noise: smooth random slopes, summed over octaves.

Sources: Perlin, "An image synthesizer", SIGGRAPH 1985, with the fifth-degree blend of "Improving noise", 2002; ridges
as in Musgrave's multifractals (Ebert et al., "Texturing and Modeling", 2003).  Written here, as no kept library draws
the gradients from a counter, which "image i is the same everywhere" needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_choice, as_integer, as_range, colour_param, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.counter_rng import below, unit32, words32
from dpsyngen.programs.drawing.fields import COLOURED, COLOURS, ROTATION, paint_fields
from dpsyngen.programs.drawing.portable import compiled, cos_sin, exp2, log2
from dpsyngen.programs.registry import register

KINDS = ("perlin", "ridged", "mixed")

_LAW = np.uint64(0x6E6C6177)  # "nlaw"
_SLOPES = np.uint64(0x736C6F70)  # "slop"
_OFFSETS = np.uint64(0x6E6F6666)  # "noff"


@register("smooth-noise")
@dataclass(frozen=True, kw_only=True)
class SmoothNoise(Program):
    """Sums of Perlin noise over octaves, each twice as fine as the one before and `persistence` times as strong.

    Octaves finer than two pixels to a cell are left out.

    Attributes:
        kind: "perlin", "ridged" (1 − |noise|: sharp crests) or "mixed" (each image one of them, evenly).
        cells: range of the cells across an image, log-uniform; 0.5 to 256.
        octaves: largest number of octaves, 1 to 10; an image has 1 to that many, evenly.
        persistence: range, uniform; 0 to 1.
        colour: as in "spectrum": "grey", "rotation" or "palette".
    """

    prior_tier: ClassVar[int] = 0

    kind: str = param("mixed", as_choice, KINDS)
    cells: Any = param((1.0, 8.0), as_range, 0.5, 256.0)
    octaves: int = param(5, as_integer, 1, 10)
    persistence: Any = param((0.3, 0.8), as_range, 0.0, 1.0)
    colour: str = colour_param(COLOURS, COLOURED)

    def _law(self) -> Law:
        return KINDS.index(self.kind), self.cells, self.octaves, self.persistence

    def _draw(self, indices: Words, out: Images) -> None:
        draw(indices, np.uint64(self.seed), self._law(), COLOURS.index(self.colour), out)


@compiled
def law_of(seed: Word, index: Word, law: Law) -> tuple[int, float, int, float]:
    """Draw kind, cells, octaves and persistence of an image."""
    kind, (cells_low, cells_high), octaves, (persistence_low, persistence_high) = law
    a, b, c, d = words32(seed, _LAW, index, np.uint64(0))
    if kind == 2:
        kind = below(a, 2)
    cells = cells_low * exp2(unit32(b) * log2(cells_high / cells_low))
    count = 1 + below(c, octaves)
    return kind, cells, count, persistence_low + unit32(d) * (persistence_high - persistence_low)


@compiled
def add_octave(
    seed: Word, index: Word, octave: int, cells: float, strength: float, ridged: bool, field: Floats
) -> None:
    """Add `strength` times one octave of noise to `field`, [S, S]; `octave` numbers those of the image."""
    size = field.shape[0]
    a, b, _, _ = words32(seed, _OFFSETS, index, np.uint64(octave))
    left = unit32(a)
    top = unit32(b)
    nodes = math.floor(cells) + 3
    xs = np.empty((nodes, nodes))
    ys = np.empty((nodes, nodes))
    for p in range(nodes):  # a unit slope at each node of the lattice
        for q in range(0, nodes, 4):
            block = np.uint64((octave << 20) | (p << 8) | (q >> 2))
            four = words32(seed, _SLOPES, index, block)
            for k in range(min(4, nodes - q)):
                xs[p, q + k], ys[p, q + k] = cos_sin(unit32(four[k]))
    step = cells / size
    for i in range(size):
        y = top + (i + 0.5) * step
        p = math.floor(y)
        y -= p
        # Perlin's blend 6t⁵ − 15t⁴ + 10t³: first and second derivative vanish at the nodes, so cells join smoothly.
        fade_y = y * y * y * (y * (y * 6.0 - 15.0) + 10.0)
        for j in range(size):
            x = left + (j + 0.5) * step
            q = math.floor(x)
            x -= q
            fade_x = x * x * x * (x * (x * 6.0 - 15.0) + 10.0)
            # At each corner: its slope times the way from there.
            a00 = xs[p, q] * x + ys[p, q] * y
            a01 = xs[p, q + 1] * (x - 1.0) + ys[p, q + 1] * y
            a10 = xs[p + 1, q] * x + ys[p + 1, q] * (y - 1.0)
            a11 = xs[p + 1, q + 1] * (x - 1.0) + ys[p + 1, q + 1] * (y - 1.0)
            upper = a00 + fade_x * (a01 - a00)
            lower = a10 + fade_x * (a11 - a10)
            noise = upper + fade_y * (lower - upper)
            field[i, j] += strength * (0.5 - abs(noise) if ridged else noise)


@compiled
def draw(indices: Words, seed: Word, law: Law, colour: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    size = out.shape[2]
    fields = np.empty((3, size, size))
    for n in range(indices.shape[0]):
        index = indices[n]
        chosen, first, count, persistence = law_of(seed, index, law)
        for k in range(3 if colour == ROTATION else 1):
            fields[k] = 0.0
            strength = 1.0
            cells = first
            for octave in range(count):
                if octave > 0 and 2.0 * cells > size:
                    break
                add_octave(seed, index, 16 * k + octave, min(cells, 256.0), strength, chosen == 1, fields[k])
                strength *= persistence
                cells *= 2.0
        paint_fields(seed, index, fields, colour, out[n])
