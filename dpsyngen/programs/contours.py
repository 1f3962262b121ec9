"""Contours: single closed figures on plain ground, which have a border, an inside and an outside, and no meaning.

Sources: radial harmonics are the figures of RCDB in Kataoka et al., "Replacing labeled real-image datasets with
auto-generated contours", CVPR 2022; superellipses are Lamé's; the others are our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_choice, as_counts, as_flag, as_number, as_range, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.colours import GROUNDS, ground_colour, ink_colour
from dpsyngen.programs.drawing.counter_rng import below, fill_uniform, unit32, words32
from dpsyngen.programs.drawing.portable import compiled, cos_sin, exp2, power
from dpsyngen.programs.drawing.raster import add_segment, blend, blend_gradient, fill_polygon, to_levels
from dpsyngen.programs.registry import register

SHAPES = ("polygon", "superellipse", "mirrored", "harmonics", "mixed")
POLYGON, SUPERELLIPSE, MIRRORED, HARMONICS, MIXED = range(5)
MAX_FIGURES = 8
POINTS = 96  # of an outline

_VALUES = 32
_LAW = np.uint64(0x636F6E74)  # "cont"
_PER_FIGURE = 16  # blocks


@register("contours")
@dataclass(frozen=True, kw_only=True)
class Contours(Program):
    """One or a few figures, each filled with one colour or a gradient, or drawn as an outline; anti-aliased.

    =============  ====================================================================================
    polygon        3 to 9 corners at sorted uniform angles, at 30 to 100 % of the radius
    superellipse   |x/a|ᵐ + |y/b|ᵐ = 1 with m from ½ to 8, log-uniform, and a : b from ¼ to 4
    mirrored       a smooth outline through 8 random points, and its mirror image: like vases and leaves
    harmonics      r(φ) = 1 + Σ aₖ·cos(kφ + φₖ), k = 2 to 7, with aₖ uniform below roughness/k
    mixed          each figure one of these, evenly
    =============  ====================================================================================

    Superellipses, mirrored figures and harmonics are scaled to touch the circle of their radius; no figure leaves it.

    Attributes:
        shape: one of the above.
        figures: range of their number, 1 to 8, evenly; later ones lie over earlier ones.
        radius: range of the radius as a fraction of the resolution, uniform; 0.02 to 1.
        roughness: of the harmonics; 0 to 1.
        outline: probability that a figure is drawn as an outline; 0 to 1.
        gradient: probability that a filled figure has a gradient of two colours; 0 to 1.
        upright: do not turn figures: mirrored ones get a vertical axis.
        ground: "black", "white" or "random"; figures stand out from it by 64 levels or more.
    """

    prior_tier: ClassVar[int] = 1

    shape: str = param("mixed", as_choice, SHAPES)
    figures: Any = param((1, 3), as_counts, 1, MAX_FIGURES)
    radius: Any = param((0.15, 0.45), as_range, 0.02, 1.0)
    roughness: float = param(0.6, as_number, 0.0, 1.0)
    outline: float = param(0.25, as_number, 0.0, 1.0)
    gradient: float = param(0.25, as_number, 0.0, 1.0)
    upright: bool = param(False, as_flag)
    ground: str = param("black", as_choice, GROUNDS)

    def _law(self) -> Law:
        shape, ground = SHAPES.index(self.shape), GROUNDS.index(self.ground)
        return self.figures, shape, self.radius, self.roughness, self.outline, self.upright, self.gradient, ground

    def _draw(self, indices: Words, out: Images) -> None:
        draw(indices, np.uint64(self.seed), self._law(), out)


@compiled
def figure_count(seed: Word, index: Word, law: Law) -> int:
    """Draw how many figures image `index` has."""
    w, _, _, _ = words32(seed, _LAW, index, np.uint64(0))
    low, high = law[0]
    return low + below(w, high - low + 1)


@compiled
def _polygon(u: Floats, xs: Floats, ys: Floats) -> None:
    """Corners at sorted angles; the points are spread over the edges."""
    corners = 3 + min(6, int(7.0 * u[0]))
    angles = np.sort(u[1 : 1 + corners])
    per = POINTS // corners
    k = 0
    for corner in range(corners):
        after = (corner + 1) % corners
        ca, sa = cos_sin(angles[corner])
        cb, sb = cos_sin(angles[after])
        ra = 0.3 + 0.7 * u[12 + corner]
        rb = 0.3 + 0.7 * u[12 + after]
        steps = per if corner < corners - 1 else POINTS - k
        for step in range(steps):
            t = step / steps
            xs[k] = ra * ca + t * (rb * cb - ra * ca)
            ys[k] = ra * sa + t * (rb * sb - ra * sa)
            k += 1


@compiled
def _superellipse(u: Floats, xs: Floats, ys: Floats) -> None:
    """Lamé's curve by x = ±a·|cos φ|^(2/m), y = ±b·|sin φ|^(2/m)."""
    exponent = 2.0 / exp2(4.0 * u[0] - 1.0)
    a = 0.25 + 0.75 * u[1]
    b = 0.25 + 0.75 * u[2]
    for k in range(POINTS):
        cos, sin = cos_sin(k / POINTS)
        x = a * power(abs(cos), exponent)
        y = b * power(abs(sin), exponent)
        xs[k] = x if cos >= 0.0 else -x
        ys[k] = y if sin >= 0.0 else -y


@compiled
def _mirrored(u: Floats, xs: Floats, ys: Floats) -> None:
    half = POINTS // 2
    knots = 8
    for k in range(half):
        t = (k + 0.5) / half * (knots - 1)
        i = min(knots - 2, int(t))
        t -= i
        # Catmull and Rom's cubic through the widths at the knots.
        p0 = u[max(0, i - 1)]
        p1 = u[i]
        p2 = u[i + 1]
        p3 = u[min(knots - 1, i + 2)]
        value = p1 + 0.5 * t * (p2 - p0 + t * (2.0 * p0 - 5.0 * p1 + 4.0 * p2 - p3 + t * (3.0 * (p1 - p2) + p3 - p0)))
        xs[k] = 0.08 + 0.8 * max(0.0, value) * (0.4 + 0.6 * u[knots])
        ys[k] = -1.0 + 2.0 * k / (half - 1)
        xs[POINTS - 1 - k], ys[POINTS - 1 - k] = -xs[k], ys[k]  # the mirror image, on the way back


@compiled
def _harmonics(u: Floats, roughness: float, xs: Floats, ys: Floats) -> None:
    """r(φ) = 1 + Σ aₖ·cos(kφ + φₖ)."""
    for k in range(POINTS):
        cos, sin = cos_sin(k / POINTS)
        r = 1.0
        for wave in range(2, 8):
            ripple, _ = cos_sin(wave * k / POINTS + u[2 * wave])
            r += roughness / wave * u[2 * wave + 1] * ripple
        r = max(0.05, r)
        xs[k] = r * cos
        ys[k] = r * sin


@compiled
def draw_figure(seed: Word, index: Word, number: int, law: Law, size: int) -> tuple[int, Floats, Floats, bool]:
    """Draw a figure: its shape, the points (x, y) of its outline in pixels, and whether only the outline shows."""
    _, shape, (small, large), roughness, outline, upright, _, _ = law
    block = np.uint64(1 + _PER_FIGURE * number)
    a, b, c, d = words32(seed, _LAW, index, block)
    e, f, _, _ = words32(seed, _LAW, index, block + np.uint64(1))
    u = np.empty(_VALUES)
    fill_uniform(seed, _LAW, index, block + np.uint64(2), u)
    xs = np.empty(POINTS)
    ys = np.empty(POINTS)
    if shape == MIXED:
        shape = below(a, 4)
    if shape == POLYGON:
        _polygon(u, xs, ys)
    elif shape == SUPERELLIPSE:
        _superellipse(u, xs, ys)
    elif shape == MIRRORED:
        _mirrored(u, xs, ys)
    else:
        _harmonics(u, roughness, xs, ys)
    # Scale to the unit circle, except polygons, whose corners lie within it as drawn; then to the radius, and turn.
    radius = size * (small + unit32(b) * (large - small))
    largest = math.sqrt(max(1.0 if shape == POLYGON else 0.0, (xs * xs + ys * ys).max()))
    xs /= largest
    ys /= largest
    cos, sin = cos_sin(0.0 if upright else unit32(c))
    # The centre is uniform where the whole figure fits into the image, or in the middle if it does not fit.
    room = max(0.0, size - 2.0 * radius)
    x = 0.5 * size + (unit32(d) - 0.5) * room
    y = 0.5 * size + (unit32(e) - 0.5) * room
    xs, ys = x + radius * (cos * xs - sin * ys), y + radius * (sin * xs + cos * ys)
    return shape, xs, ys, unit32(f) < outline


@compiled
def draw(indices: Words, seed: Word, law: Law, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    gradient, ground = law[6:]
    size = out.shape[2]
    grey = out.shape[1] == 1
    canvas = np.empty((out.shape[1], size, size))
    cover = np.empty((size, size))
    for n in range(indices.shape[0]):
        index = indices[n]
        behind = ground_colour(seed, index, ground, grey)
        for channel in range(out.shape[1]):
            canvas[channel] = behind[channel]
        for k in range(figure_count(seed, index, law)):
            _, xs, ys, hollow = draw_figure(seed, index, k, law, size)
            ink = ink_colour(seed, index, 2 * k, grey, behind)
            a, b, c, _ = words32(seed, _LAW, index, np.uint64(_PER_FIGURE * (k + 1)))
            if hollow:
                cover[:] = 0.0
                half = size * (0.01 + 0.03 * unit32(a))
                for p in range(POINTS):
                    q = (p + 1) % POINTS
                    add_segment(cover, xs[p], ys[p], xs[q], ys[q], half, half)
            else:
                fill_polygon(xs, ys, cover)
            if not hollow and unit32(b) < gradient:
                other = ink_colour(seed, index, 2 * k + 1, grey, behind)
                cos, sin = cos_sin(unit32(c))
                blend_gradient(canvas, cover, ink, other, cos, sin)
            else:
                blend(canvas, cover, ink)
        to_levels(canvas, out[n])
