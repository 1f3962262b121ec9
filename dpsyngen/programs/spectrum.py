"""Random fields with a 1/f spectrum: the power of natural images at each frequency, and nothing else of them.

Source: the spectrum model of Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963, written from its
description: amplitude 1/(|u|^a + |v|^b) with random exponents, random phases, and colours of a random palette.
Ours has its axes turned by a random angle, and no colour was measured on photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_flag, as_number, as_range, colour_param, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.counter_rng import unit32, words32
from dpsyngen.programs.drawing.fields import COLOURED, COLOURS, ROTATION, inverse_2d, paint_fields, power_of_two
from dpsyngen.programs.drawing.portable import compiled, cos_sin, normal_pair, power
from dpsyngen.programs.registry import register

_LAW = np.uint64(0x73706563)  # "spec"
_PHASES = np.uint64(0x70686173)  # "phas"


@register("spectrum")
@dataclass(frozen=True, kw_only=True)
class Spectrum(Program):
    """Gaussian-like fields whose amplitude falls as 1/(|u|^(s + d) + |v|^(s − d)), with u, v turned frequency axes.

    The field is drawn on the next power of two and cut, so it does not wrap around at sizes in between.

    Attributes:
        slope: range of s, uniform; 0 to 6.  One number fixes it.
        difference: standard deviation of d, normal; 0 to 1.
        turn: turn the axes by a uniform angle; else they are those of the image.
        colour: "grey": one field; "rotation": three fields mixed so that colours vary like a random palette of 3 to 22
            colours; "palette": one field, cut into levels so that each colour of such a palette covers its share.  The
            last two need channels=3.  None, the default, means "grey" for 1 channel and "rotation" for 3.
    """

    prior_tier: ClassVar[int] = 0

    slope: Any = param((0.5, 3.5), as_range, 0.0, 6.0)
    difference: float = param(0.05, as_number, 0.0, 1.0)
    turn: bool = param(True, as_flag)
    colour: str = colour_param(COLOURS, COLOURED)

    def _law(self) -> Law:
        return self.slope, self.difference, self.turn

    def _draw(self, indices: Words, out: Images) -> None:
        size = power_of_two(self.resolution)
        draw(indices, np.uint64(self.seed), self._law(), COLOURS.index(self.colour), size, out)


@compiled
def law_of(seed: Word, index: Word, law: Law) -> tuple[float, float, float]:
    """Draw slope, difference and turns of the axes of an image."""
    (low, high), spread, turn = law
    a, b, c, d = words32(seed, _LAW, index, np.uint64(0))
    normal, _ = normal_pair(unit32(b), unit32(c))
    return low + unit32(a) * (high - low), spread * normal, unit32(d) if turn else 0.0


@compiled
def amplitudes_of(slope: float, difference: float, turns: float, out: Floats) -> None:
    """Write the amplitude at each frequency of an n × n field: equal at f and −f, 0 at the origin; [n, n]."""
    n = out.shape[0]
    cos, sin = cos_sin(turns)
    for i in range(n // 2 + 1):  # the other half follows
        for j in range(n):
            fy = i / n
            fx = (j if 2 * j <= n else j - n) / n
            u = abs(fx * cos + fy * sin)
            v = abs(fy * cos - fx * sin)
            # Baradad et al.: amplitude 1/(|u|^a + |v|^b).
            below = power(u, slope + difference) + power(v, slope - difference)
            out[i, j] = 1.0 / below if below > 0.0 else 0.0
            if i > 0:
                out[n - i, n - j if j > 0 else 0] = out[i, j]
    for j in range(1, n // 2):  # rows 0 and n/2 hold their own opposites
        out[0, n - j] = out[0, j]
        if n > 1:
            out[n // 2, n - j] = out[n // 2, j]
    out[0, 0] = 0.0


@compiled
def _phase(re: Floats, im: Floats, amplitude: float, turns: float, second: bool, i: int, j: int) -> None:
    """Add a real wave: F(−f) is the conjugate of F(f).  That of the second field is multiplied by i."""
    n = re.shape[0]
    cos, sin = cos_sin(turns)
    x = amplitude * cos
    y = amplitude * sin
    p = n - i if i > 0 else 0
    q = n - j if j > 0 else 0
    alone = p == i and q == j
    if alone:  # its own opposite: real
        x, y = (amplitude if cos >= 0.0 else -amplitude), 0.0
    sign = 1.0
    if second:  # i·(x + iy) = −y + ix, and i·(x − iy) = y + ix
        x, y, sign = -y, x, -1.0
    re[i, j] += x
    im[i, j] += y
    if not alone:
        re[p, q] += sign * x
        im[p, q] -= sign * y


@compiled
def two_fields(seed: Word, index: Word, pair: int, both: bool, amplitudes: Floats, re: Floats, im: Floats) -> None:
    """Draw two fields f, g with one transform, as f + i·g; without `both` only f."""
    n = re.shape[0]
    re[:] = 0.0
    im[:] = 0.0
    for i in range(n // 2 + 1):
        for j in range(n):
            # Visit each pair of opposite frequencies once, with a random phase for each field.
            if (2 * i == n or i == 0) and 2 * j > n:
                continue
            block = np.uint64((pair * n + i) * n + j)
            a, b, _, _ = words32(seed, _PHASES, index, block)
            _phase(re, im, amplitudes[i, j], unit32(a), False, i, j)
            if both:
                _phase(re, im, amplitudes[i, j], unit32(b), True, i, j)
    inverse_2d(re, im)


@compiled
def draw(indices: Words, seed: Word, law: Law, colour: int, n: int, out: Images) -> None:
    """Draw image ``indices[k]`` into ``out[k]``, [C, S, S], from fields of n × n."""
    amplitudes = np.empty((n, n))
    fields = np.empty((4, n, n))
    for k in range(indices.shape[0]):
        index = indices[k]
        slope, difference, turns = law_of(seed, index, law)
        amplitudes_of(slope, difference, turns, amplitudes)
        two_fields(seed, index, 0, colour == ROTATION, amplitudes, fields[0], fields[1])
        if colour == ROTATION:
            two_fields(seed, index, 1, False, amplitudes, fields[2], fields[3])
        paint_fields(seed, index, fields, colour, out[k])
