"""Fractals of iterated function systems: attractors of a few random affine maps.

Sources: Barnsley, "Fractals Everywhere", 1988; as images to learn from, Kataoka et al., "Pre-training without natural
images", ACCV 2020; drawing the maps by their singular values, so that every system is a contraction and none is thrown
away, Anderson and Farrell, "Improving fractal pre-training", WACV 2022.  Their σ-factor, Σ (σ₁ + 2σ₂) over the N maps,
is drawn from [½(5 + N), ½(6 + N)], where attractors are neither dust nor blobs.  Colours follow the map taken last,
mixed with those before (as in Draves, "The fractal flame algorithm", 2003).  Written from those descriptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_choice, as_counts, as_integer, param
from dpsyngen.programs.drawing import Floats, Images, Word, Words
from dpsyngen.programs.drawing.colours import GROUNDS, ground_colour, uniform_colour
from dpsyngen.programs.drawing.counter_rng import below, pick, unit32, words, words32
from dpsyngen.programs.drawing.portable import compiled, cos_sin, log2
from dpsyngen.programs.drawing.raster import to_levels
from dpsyngen.programs.registry import register

MAX_MAPS = 8
_BURN_IN = 24

_LAW = np.uint64(0x69667361)  # "ifsa"
_MAPS = np.uint64(0x69667362)  # "ifsb"
_STEPS = np.uint64(0x69667363)  # "ifsc"


@register("fractal")
@dataclass(frozen=True, kw_only=True)
class Fractal(Program):
    """One attractor on plain ground, fitted to the image: brightness grows with the logarithm of the visits to a pixel.

    Attributes:
        maps: range of the number of maps, 2 to 8, evenly.
        points: points drawn, per pixel of the image; 1 to 100.
        ground: "black", "white" or "random" (a uniform colour).  Maps have uniform colours, on black and white from the
            three quarters of the range that are farther from it.
    """

    prior_tier: ClassVar[int] = 0

    maps: Any = param((2, 6), as_counts, 2, MAX_MAPS)
    points: int = param(8, as_integer, 1, 100)
    ground: str = param("black", as_choice, GROUNDS)

    def _draw(self, indices: Words, out: Images) -> None:
        draw(indices, np.uint64(self.seed), *self.maps, self.points, GROUNDS.index(self.ground), out)


@compiled
def draw_maps(seed: Word, index: Word, low: int, high: int) -> Floats:
    """Draw a contracting system, a map a row: a, b, c, d, e, f of (x, y) → (ax + by + e, cx + dy + f); cumulative
    chance; σ₁, σ₂.

    The σ-factor is dealt to the maps one after another: each gets a uniform share c of what can still be dealt so that
    the rest fits into the maps to come (each takes 0 to 3), and splits it as σ₁ + 2σ₂ = c with 0 ≤ σ₂ ≤ σ₁ ≤ 1, σ₂
    uniform.  No system is rejected.
    """
    w0, w1, _, _ = words32(seed, _LAW, index, np.uint64(0))
    count = low + below(w0, high - low + 1)
    left = 0.5 * (5.0 + count + unit32(w1))
    maps = np.empty((count, 9))
    total = 0.0
    for k in range(count):
        # This map's share of the σ-factor: what is left, less the most that the maps to come can take, is the least.
        w0, w1, w2, w3 = words32(seed, _MAPS, index, np.uint64(2 * k))
        after = 3.0 * (count - 1 - k)
        least = max(0.0, left - after)
        share = least + unit32(w0) * (min(3.0, left) - least)
        left -= share
        least = max(0.0, 0.5 * (share - 1.0))
        s2 = least + unit32(w1) * (share / 3.0 - least)
        s1 = share - 2.0 * s2
        ca, sa = cos_sin(unit32(w2))
        cb, sb = cos_sin(unit32(w3))
        w0, w1, w2, _ = words32(seed, _MAPS, index, np.uint64(2 * k + 1))
        # A = R(α)·diag(σ₁, σ₂)·R(β)·diag(±1, ±1)
        flip_x = -1.0 if w2 & np.uint64(1) else 1.0
        flip_y = -1.0 if w2 & np.uint64(2) else 1.0
        row = maps[k]
        row[0] = (ca * s1 * cb - sa * s2 * sb) * flip_x
        row[1] = (-ca * s1 * sb - sa * s2 * cb) * flip_y
        row[2] = (sa * s1 * cb + ca * s2 * sb) * flip_x
        row[3] = (-sa * s1 * sb + ca * s2 * cb) * flip_y
        row[4] = 2.0 * unit32(w0) - 1.0
        row[5] = 2.0 * unit32(w1) - 1.0
        # As often as its image has area; a map onto a line or point still gets its turn.
        total += max(s1 * s2, 0.01)
        row[6] = total
        row[7] = s1
        row[8] = s2
    maps[:, 6] /= total
    return maps


@compiled
def draw(indices: Words, seed: Word, low: int, high: int, per_pixel: int, ground: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    channels = out.shape[1]
    size = out.shape[2]
    steps = max(64, per_pixel * size * size)
    xs = np.empty(steps)
    ys = np.empty(steps)
    shades = np.empty((steps, 3), dtype=np.float32)
    colours = np.empty((MAX_MAPS, 3))
    visits = np.empty((size, size), dtype=np.int64)
    sums = np.empty((size, size, 3))
    canvas = np.empty((channels, size, size))
    for n in range(indices.shape[0]):
        index = indices[n]
        maps = draw_maps(seed, index, low, high)
        for k in range(len(maps)):
            colours[k] = uniform_colour(seed, _LAW, index, np.uint64(k + 1), channels == 1)
            if ground < 2:  # away from the ground
                colours[k] = 0.75 * colours[k] + (64.0 if ground == 0 else 0.0)
        behind = ground_colour(seed, index, ground, channels == 1)

        chances = maps[:, 6].copy()
        x, y = 0.0, 0.0
        red, green, blue = 128.0, 128.0, 128.0
        # The chaos game: a random map at each step; after a few steps the point is on the attractor.
        for step in range(-_BURN_IN, steps):
            word, _ = words(seed, _STEPS, index, np.uint64(step + _BURN_IN))
            k = pick(word >> np.uint64(32), chances)
            row = maps[k]
            x, y = row[0] * x + row[1] * y + row[4], row[2] * x + row[3] * y + row[5]
            red = 0.5 * (red + colours[k, 0])
            green = 0.5 * (green + colours[k, 1])
            blue = 0.5 * (blue + colours[k, 2])
            if step >= 0:
                xs[step], ys[step] = x, y
                shades[step, 0], shades[step, 1], shades[step, 2] = red, green, blue

        # Fit the points into the image, a pixel from its border.
        left, right, top, bottom = xs.min(), xs.max(), ys.min(), ys.max()
        span = max(max(right - left, bottom - top), 1e-9)
        scale = (size - 2.0) / span if size > 4 else size / span
        shift_x = 0.5 * size - scale * 0.5 * (left + right)
        shift_y = 0.5 * size - scale * 0.5 * (top + bottom)
        visits[:] = 0
        sums[:] = 0.0
        for step in range(steps):
            j = min(size - 1, max(0, math.floor(xs[step] * scale + shift_x)))
            i = min(size - 1, max(0, math.floor(ys[step] * scale + shift_y)))
            visits[i, j] += 1
            for c in range(3):
                sums[i, j, c] += shades[step, c]
        # Density spans orders of magnitude: show its logarithm (Draves).
        per = 1.0 / log2(1.0 + visits.max())
        for i in range(size):
            for j in range(size):
                seen = visits[i, j]
                share = log2(1.0 + seen) * per
                for c in range(channels):
                    colour = sums[i, j, c] / seen if seen else behind[c]
                    canvas[c, i, j] = behind[c] + share * (colour - behind[c])
        to_levels(canvas, out[n])
