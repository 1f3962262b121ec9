"""Dead leaves as published: painted forward, each leaf over the earlier ones, until nothing of the ground shows.

Source: the radius law, the shapes and the order of painting of Baradad et al., "Learning to See by Looking at Noise",
arXiv 2106.05963, as used by Choi et al., arXiv 2412.09842.  Written from those descriptions.  Centres are uniform in
the canvas only and painting stops at coverage, so this is not a sample of the dead-leaves model: see `exact_leaves`.

Where we differ from the published programs: radii and centres are continuous (theirs are rounded to whole pixels), and
there is no cap on the number of leaves, so no image has holes.
"""

from __future__ import annotations

import math

import numpy as np

from dpsyngen.programs.drawing import Canvas, Floats, Images, Ints, Word, Words
from dpsyngen.programs.drawing.colours import PALETTE, colour_of, draw_palette
from dpsyngen.programs.drawing.counter_rng import ONE, pick, to_unit, unit_vector, words
from dpsyngen.programs.drawing.exact_leaves import unpack
from dpsyngen.programs.drawing.portable import ROOT_HALF, compiled
from dpsyngen.programs.drawing.shapes import (
    DISC,
    ORIENTED_SQUARE,
    RECTANGLE,
    SQUARE,
    TRIANGLE,
    LeafLaw,
    convex_spans,
    disc_spans,
    rectangle_spans,
)

EMPTY = -1

_STREAM = np.uint64(0x6C656166)  # "leaf"


@compiled
def paint(canvas: Canvas, starts: Ints, stops: Ints, first: int, stop: int, value: int) -> tuple[int, int]:
    """Paint the spans of rows `first` to `stop`; returns how many pixels they have, and how many of them were empty."""
    painted, fresh = 0, 0
    for row in range(first, stop):
        for column in range(starts[row], stops[row]):
            fresh += canvas[row, column] < 0
            canvas[row, column] = value
            painted += 1
    return painted, fresh


@compiled
def leaf_radius(v: float, r_min: float, r_max: float) -> float:
    """Return the radius that a share v of leaves exceeds: the inverse of 1 − CDF of the density ∝ r⁻³ − r_max⁻³.

    From r_max at v = 0 down to r_min at v = 1.  With t = r_max/r − 1 the law 1 − CDF = v reads t²(t + 3)/(1 + t) = d,
    where d is v times its left side at r_min.  Newton's method on the cubic t²(t + 3) − d(1 + t), convex for t ≥ 0,
    from the lower of two upper bounds of its root: (t + 3)/(1 + t) ≥ 1 gives √d, and (1 + t)² = d + 3 − 2/(1 + t) the
    other.  It stops when the next step, of square size, would be below rounding.
    """
    top = r_max / r_min - 1.0
    d = v * (top * top * (top + 3.0) / (1.0 + top))
    if d <= 0.0:
        return r_max
    t = min(math.sqrt(d), math.sqrt(d + 3.0) - 1.0)  # Newton falls from there, and cannot overshoot
    step = t
    while step > 1e-9 * t:
        step = (t * t * (t + 3.0) - d * (1.0 + t)) / (3.0 * t * t + 6.0 * t - d)
        t -= step
    return max(r_min, r_max / (1.0 + t))


@compiled
def _corner_angle(x: float, y: float) -> float:
    """Return what increases with the angle of (x, y), from 0 to 4; exact where arctan is not."""
    share = y / (abs(x) + abs(y))
    if x < 0.0:
        return 2.0 - share
    return share if y >= 0.0 else 4.0 + share


@compiled
def _corners_on_circle(seed: Word, index: Word, block: Word, xs: Floats, ys: Floats, corners: int) -> Word:
    """Fill xs, ys with 3 or 4 uniform directions in cyclic order; returns the first block not used."""
    for k in range(corners):
        xs[k], ys[k], block = unit_vector(seed, _STREAM, index, block)
    if corners == 4:  # any order of three is cyclic
        for k in range(1, 4):  # insertion sort
            place = k
            while place > 0 and _corner_angle(xs[place - 1], ys[place - 1]) > _corner_angle(xs[place], ys[place]):
                xs[place - 1], xs[place] = xs[place], xs[place - 1]
                ys[place - 1], ys[place] = ys[place], ys[place - 1]
                place -= 1
    return block


@compiled
def paint_over(canvas: Canvas, seed: Word, index: Word, law: LeafLaw) -> int:
    """Paint leaves, later over earlier, until no pixel is empty; returns their number.

    Ends with probability 1, and soon: a leaf never vanishes (one too small or thin to hold a pixel centre
    paints the pixel under its middle), and every pixel has a chance with each leaf.
    """
    size = canvas.shape[0]
    starts, stops = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    xs, ys = np.empty(4), np.empty(4)
    palette = np.empty(8, dtype=np.int64)
    only, colour = law.only, law.colour
    colours = draw_palette(seed, index, law.grey, palette) if colour == PALETTE else 0
    canvas[:] = EMPTY
    empty = size * size
    leaves = 0
    block = np.uint64(0)
    while empty > 0:
        word_x, word_y = words(seed, _STREAM, index, block)
        word_radius, word_kind = words(seed, _STREAM, index, block + ONE)
        block = block + ONE + ONE
        # Baradad et al.: centre uniform in the canvas, radius ∝ r⁻³ − r_max⁻³, colour and shape independent.
        x = to_unit(word_x) * size
        y = to_unit(word_y) * size
        radius = leaf_radius(to_unit(word_radius), law.r_min, law.r_max) * size
        value = colour_of(word_kind, colour, palette, colours)
        kind = only if only >= 0 else pick(word_kind >> np.uint64(32), law.shares)

        corners = 0
        cos, sin = ROOT_HALF, ROOT_HALF
        if kind in (RECTANGLE, ORIENTED_SQUARE):
            cos, sin, block = unit_vector(seed, _STREAM, index, block)
        if kind == DISC:
            first, stop = disc_spans(size, x, y, radius, starts, stops)
        elif kind in (SQUARE, RECTANGLE):
            first, stop = rectangle_spans(size, x, y, radius * abs(cos), radius * abs(sin), starts, stops)
        elif kind == ORIENTED_SQUARE:
            corners = 4
            xs[0], xs[1], xs[2], xs[3] = cos, -sin, -cos, sin
            ys[0], ys[1], ys[2], ys[3] = sin, cos, -sin, -cos
        else:
            corners = 3 if kind == TRIANGLE else 4
            block = _corners_on_circle(seed, index, block, xs, ys, corners)
        if corners > 0:
            middle_x, middle_y = 0.0, 0.0
            for k in range(corners):
                xs[k] = x + radius * xs[k]
                ys[k] = y + radius * ys[k]
                middle_x += xs[k] / corners
                middle_y += ys[k] / corners
            x, y = middle_x, middle_y
            first, stop = convex_spans(size, xs, ys, corners, starts, stops)
        painted, fresh = paint(canvas, starts, stops, first, stop, value)
        row, column = math.floor(y), math.floor(x)
        # Without this, leaves below a pixel could go on forever without reaching the last empty one.
        if painted == 0 and 0 <= row < size and 0 <= column < size:
            fresh = 1 if canvas[row, column] < 0 else 0
            canvas[row, column] = value
        empty -= fresh
        leaves += 1
    return leaves


@compiled
def draw_reference(indices: Words, seed: Word, law: LeafLaw, factor: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, H, W]; the side of the canvas is `factor` times the image's."""
    size = out.shape[2] * factor
    canvas = np.empty((size, size), dtype=np.int32)
    for n in range(indices.shape[0]):
        paint_over(canvas, seed, indices[n], law)
        unpack(canvas, factor, out[n])
