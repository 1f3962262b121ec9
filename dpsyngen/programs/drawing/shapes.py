"""Leaves: the law of their radii, and their shapes as one span of pixels to a row.

Radii have density ∝ r^−α, so their distribution is inverted in closed form: no table and no rejection.

A pixel (row i, column j) belongs to a shape when its centre (x, y) = (j + ½, i + ½) does.  Each function here writes,
for every row it returns, the pixels ``starts[row] ≤ column < stops[row]``, clipped to a canvas of `size` × `size`, and
returns the rows as (first, stop).  Rows of a convex shape have one span; it may be empty.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dpsyngen.programs.drawing import Floats, Ints, Word
from dpsyngen.programs.drawing.portable import LN2, ROOT_HALF, compiled, cos_sin, exp2, log2, power

DISC, SQUARE, ORIENTED_SQUARE, RECTANGLE, TRIANGLE, QUADRILATERAL = range(6)
KINDS = ("disc", "square", "oriented-square", "rectangle", "triangle", "quadrilateral")

_16 = np.uint64(16)
_LOW_16 = np.uint64(0xFFFF)


@compiled
def disc_spans(size: int, x: float, y: float, radius: float, starts: Ints, stops: Ints) -> tuple[int, int]:
    """Find the pixels of the disc of centre (x, y)."""
    first = max(0, math.ceil(y - radius - 0.5))
    stop = min(size, math.ceil(y + radius - 0.5))
    square = radius * radius
    left = x - 0.5
    for row in range(first, stop):
        height = row + 0.5 - y
        half = math.sqrt(max(0.0, square - height * height))
        starts[row] = max(0, math.ceil(left - half))
        stops[row] = min(size, math.ceil(left + half))
    return first, stop


@compiled
def rectangle_spans(
    size: int, x: float, y: float, half_width: float, half_height: float, starts: Ints, stops: Ints
) -> tuple[int, int]:
    """Find the pixels of the axis-aligned rectangle of centre (x, y)."""
    first = max(0, math.ceil(y - half_height - 0.5))
    stop = min(size, math.ceil(y + half_height - 0.5))
    a = max(0, math.ceil(x - half_width - 0.5))
    b = min(size, math.ceil(x + half_width - 0.5))
    for row in range(first, stop):
        starts[row] = a
        stops[row] = b
    return first, stop


@compiled
def convex_spans(size: int, xs: Floats, ys: Floats, corners: int, starts: Ints, stops: Ints) -> tuple[int, int]:
    """Find the pixels of the convex polygon whose first `corners` vertices (xs, ys) are in cyclic order."""
    low = ys[0]
    high = ys[0]
    for k in range(1, corners):
        low = min(low, ys[k])
        high = max(high, ys[k])
    first = max(0, math.ceil(low - 0.5))
    stop = min(size, math.ceil(high - 0.5))
    for row in range(first, stop):  # each edge widens the spans of the rows that it crosses
        starts[row] = size
        stops[row] = 0
    x_end = xs[corners - 1]
    y_end = ys[corners - 1]
    for k in range(corners):
        x_start, y_start = x_end, y_end
        x_end, y_end = xs[k], ys[k]
        if y_start < y_end:
            x_a, y_a, x_b, y_b = x_start, y_start, x_end, y_end
        else:
            x_a, y_a, x_b, y_b = x_end, y_end, x_start, y_start
        a = max(0, math.ceil(y_a - 0.5))
        b = min(size, math.ceil(y_b - 0.5))
        if a >= b:
            continue
        slope = (x_b - x_a) / (y_b - y_a)
        offset = x_a - 0.5
        for row in range(a, b):
            column = min(size, max(0, math.ceil(offset + (row + 0.5 - y_a) * slope)))
            starts[row] = min(starts[row], column)
            stops[row] = max(stops[row], column)
    return first, stop


class LeafLaw(NamedTuple):
    """The laws by which the leaves of a program are drawn.

    Attributes:
        shares: cumulative weights of the six `KINDS`.
        only: the one kind there is, or −1.
        colour: a law of `colours.LAWS`, by number.
        grey: whether palettes are grey.
        exponent: α of the density r^−α.
        r_min, r_max: range of the radius, in sides of the canvas.
    """

    shares: Floats
    only: int
    colour: int
    grey: bool
    exponent: float
    r_min: float
    r_max: float


@compiled
def leaf_spans(
    size: int,
    kind: int,
    x: float,
    y: float,
    radius: float,
    angle: Word,
    angles: Word,
    corners: Floats,
    starts: Ints,
    stops: Ints,
) -> tuple[int, int]:
    """Find the pixels of a shape of `KINDS` whose circumscribed circle has centre (x, y) and the given radius.

    `angle` holds 32 random bits that turn an oriented square or make a rectangle; `angles` holds four times 16, the
    corners of a triangle or quadrilateral.  `corners` is working space, [2, 4].
    """
    if kind == DISC:
        return disc_spans(size, x, y, radius, starts, stops)
    if kind == SQUARE:
        half = radius * ROOT_HALF
        return rectangle_spans(size, x, y, half, half, starts, stops)
    if kind == RECTANGLE:
        cos, sin = cos_sin((float(angle) + 0.5) * 2.0**-34)  # a quarter turn
        return rectangle_spans(size, x, y, radius * cos, radius * sin, starts, stops)
    xs, ys = corners[0], corners[1]
    if kind == ORIENTED_SQUARE:
        cos, sin = cos_sin((float(angle) + 0.5) * 2.0**-32)
        xs[0], xs[1], xs[2], xs[3] = x + radius * cos, x - radius * sin, x - radius * cos, x + radius * sin
        ys[0], ys[1], ys[2], ys[3] = y + radius * sin, y + radius * cos, y - radius * sin, y - radius * cos
        return convex_spans(size, xs, ys, 4, starts, stops)
    count = 3 if kind == TRIANGLE else 4
    a0 = angles & _LOW_16
    a1 = (angles >> _16) & _LOW_16
    a2 = (angles >> _16 >> _16) & _LOW_16
    a3 = angles >> _16 >> _16 >> _16
    if count == 4:  # sort, as corners have to be in cyclic order; any order of three is
        a0, a1 = min(a0, a1), max(a0, a1)
        a2, a3 = min(a2, a3), max(a2, a3)
        a0, a2 = min(a0, a2), max(a0, a2)
        a1, a3 = min(a1, a3), max(a1, a3)
        a1, a2 = min(a1, a2), max(a1, a2)
    for k in range(count):
        turn = a0 if k == 0 else a1 if k == 1 else a2 if k == 2 else a3
        cos, sin = cos_sin((float(turn) + 0.5) * 2.0**-16)
        xs[k] = x + radius * cos
        ys[k] = y + radius * sin
    return convex_spans(size, xs, ys, count, starts, stops)


@compiled
def mass(exponent: float, low: float, high: float) -> float:
    """Return ∫ r^−exponent dr from `low` to `high`, 0 < low ≤ high."""
    if abs(exponent - 1.0) < 1e-9:
        return log2(high / low) * LN2
    a = 1.0 - exponent
    return (power(high, a) - power(low, a)) / a


@compiled
def inverse(u: float, exponent: float, low: float, high: float) -> float:
    """Return the radius below which a share u of the density ∝ r^−exponent on [low, high] lies."""
    # F(r) = u is linear in r^(1 − exponent).  The scale-invariant laws need no powers, which are slow.
    if exponent == 3.0:
        below, above = 1.0 / (low * low), 1.0 / (high * high)
        r = 1.0 / math.sqrt(below + u * (above - below))
    elif exponent == 2.0:
        below, above = 1.0 / low, 1.0 / high
        r = 1.0 / (below + u * (above - below))
    elif abs(exponent - 1.0) < 1e-9:
        r = low * exp2(u * log2(high / low))
    else:
        a = 1.0 - exponent
        below, above = power(low, a), power(high, a)
        r = power(below + u * (above - below), 1.0 / a)
    return min(high, max(low, r))


@compiled
def padded_masses(exponent: float, low: float, high: float, size: float, out: Floats) -> float:
    """Split ∫ r^−exponent·(size + 2r)² dr on [low, high] into the three power laws of its expansion.

    ``out[k]`` becomes the mass of the law r^−(exponent − k), k = 0, 1, 2; returns their sum.
    """
    out[0] = size * size * mass(exponent, low, high)
    out[1] = 4.0 * size * mass(exponent - 1.0, low, high)
    out[2] = 4.0 * mass(exponent - 2.0, low, high)
    return out[0] + out[1] + out[2]


@compiled
def padded_radius(u: float, exponent: float, low: float, high: float, masses: Floats) -> float:
    """Draw the radius of a leaf whose centre is uniform in the canvas padded by r: density ∝ r^−exponent·(size + 2r)².

    A mixture of three power laws: u picks the law, and what is left of it the radius.  `masses` is what
    `padded_masses` wrote.
    """
    v = u * (masses[0] + masses[1] + masses[2])
    if v < masses[0]:
        return inverse(v / masses[0], exponent, low, high)
    v -= masses[0]
    if v < masses[1]:
        return inverse(v / masses[1], exponent - 1.0, low, high)
    v -= masses[1]
    return inverse(min(1.0, v / masses[2]), exponent - 2.0, low, high)
