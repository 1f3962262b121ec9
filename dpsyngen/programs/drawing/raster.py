"""Anti-aliased shapes on canvases of real numbers.

A *cover* is float64 [H, W], the share of each pixel that a shape fills; a *canvas* is float64 [C, H, W] of
levels 0 to 255.  Coordinates are in pixels: x to the right, y down, pixel (row i, column j) is the square
[j, j + 1] × [i, i + 1].
"""

from __future__ import annotations

import math

import numpy as np

from dpsyngen.programs.drawing import Floats, Images
from dpsyngen.programs.drawing.portable import compiled


@compiled
def add_edge(area: Floats, x0: float, y0: float, x1: float, y1: float) -> None:
    """Add one edge of a polygon to `area`, float64 [H, W + 1]; see `fill_polygon`.

    Within a row of pixels the edge fills, to its right, a part of the pixels it crosses and all further ones.  What is
    stored is the difference from each pixel to the one before, so that a running sum gives the signed area.
    """
    if y0 == y1:
        return
    sign = 1.0
    if y0 > y1:
        x0, y0, x1, y1 = x1, y1, x0, y0
        sign = -1.0
    height = area.shape[0]
    width = float(area.shape[1] - 1)
    slope = (x1 - x0) / (y1 - y0)
    for row in range(max(0, math.floor(y0)), min(height, math.ceil(y1))):
        top = max(y0, float(row))
        bottom = min(y1, row + 1.0)
        d = sign * (bottom - top)
        a = x0 + (top - y0) * slope  # the edge runs from a to b within this row, d of its height
        b = x0 + (bottom - y0) * slope
        if a > b:
            a, b = b, a
        # Left of the canvas an edge fills all of the row, right of it nothing.
        if b <= 0.0:
            area[row, 0] += d
            continue
        if a >= width:
            continue
        if a < 0.0 or b > width:
            per_x = d / (b - a)
            if a < 0.0:
                area[row, 0] -= a * per_x
                a = 0.0
            b = min(b, width)
            d = (b - a) * per_x
        first = math.floor(a)
        last = math.floor(b)
        if first == last:  # within one pixel: a trapezium, whose width is that at the middle
            right = 0.5 * (a + b) - first
            area[row, first] += d * (1.0 - right)
            if first + 1 < area.shape[1]:
                area[row, first + 1] += d * right
            continue
        per_x = d / (b - a)
        before = 0.0
        for column in range(first, last + 1):
            left = max(a, float(column))
            right = min(b, column + 1.0)
            # The part of the edge in this column fills what is to its right here ...
            share = (right - left) * per_x * (column + 1.0 - 0.5 * (left + right))
            # ... and parts in earlier columns fill the whole pixel.
            filled = share + (left - a) * per_x
            area[row, column] += filled - before
            before = filled
        if last + 1 < area.shape[1]:
            area[row, last + 1] += d - before


@compiled
def fill_polygon(xs: Floats, ys: Floats, cover: Floats) -> None:
    """Write the cover of the polygon through the points, over what `cover` held.

    Parts that the outline winds around in either direction are filled.
    """
    area = np.zeros((cover.shape[0], cover.shape[1] + 1))
    for k in range(len(xs)):
        after = k + 1 if k + 1 < len(xs) else 0
        add_edge(area, xs[k], ys[k], xs[after], ys[after])
    for row in range(cover.shape[0]):
        total = 0.0  # the signed area so far: the winding number, in the mean over the pixel
        for column in range(cover.shape[1]):
            total += area[row, column]
            cover[row, column] = min(1.0, abs(total))


@compiled
def add_segment(cover: Floats, x0: float, y0: float, x1: float, y1: float, half_0: float, half_1: float) -> None:
    """Add a round-ended line whose half-width runs from `half_0` to `half_1`; where lines meet, the larger counts."""
    widest = max(half_0, half_1) + 1.0
    dx = x1 - x0
    dy = y1 - y0
    square = dx * dx + dy * dy
    first = max(0, math.floor(min(y0, y1) - widest))
    stop = min(cover.shape[0], math.ceil(max(y0, y1) + widest))
    left = max(0, math.floor(min(x0, x1) - widest))
    right = min(cover.shape[1], math.ceil(max(x0, x1) + widest))
    for row in range(first, stop):
        for column in range(left, right):
            # The nearest point of the line, at share t of it; the pixel is filled as far as it lies within the width.
            px = column + 0.5 - x0
            py = row + 0.5 - y0
            t = min(1.0, max(0.0, (px * dx + py * dy) / square)) if square > 0.0 else 0.0
            px -= t * dx
            py -= t * dy
            distance = math.sqrt(px * px + py * py)
            share = min(1.0, max(0.0, half_0 + t * (half_1 - half_0) + 0.5 - distance))
            cover[row, column] = max(cover[row, column], share)


@compiled
def blend(canvas: Floats, cover: Floats, colour: Floats) -> None:
    """Paint `colour`, float64 [C or more], over the canvas: each pixel moves towards it by its cover."""
    for c in range(canvas.shape[0]):
        level = colour[c]
        for i in range(canvas.shape[1]):
            for j in range(canvas.shape[2]):
                canvas[c, i, j] += cover[i, j] * (level - canvas[c, i, j])


@compiled
def blend_gradient(canvas: Floats, cover: Floats, colour: Floats, other: Floats, cos: float, sin: float) -> None:
    """Paint a colour that runs from one to the other across the canvas, in direction (cos, sin)."""
    size = canvas.shape[1]
    for i in range(size):
        for j in range(size):
            t = 0.5 + ((j + 0.5) * cos + (i + 0.5) * sin - 0.5 * size * (cos + sin)) / size
            t = min(1.0, max(0.0, t))
            for c in range(canvas.shape[0]):
                level = colour[c] + t * (other[c] - colour[c])
                canvas[c, i, j] += cover[i, j] * (level - canvas[c, i, j])


@compiled
def to_levels(canvas: Floats, out: Images) -> None:
    """Round to uint8 [C, H, W]; levels outside 0 to 255 are cut off."""
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = np.uint8(min(255.0, max(0.0, math.floor(canvas[c, i, j] + 0.5))))


@compiled
def stretch(canvas: Floats, out: Images) -> None:
    """Write the top left corner of `canvas` to `out`, its least value as 0 and its largest as 255, over all channels.

    A constant becomes 128.
    """
    corner = canvas[: out.shape[0], : out.shape[1], : out.shape[2]]
    low, high = corner.min(), corner.max()
    scale = 255.0 / (high - low) if high > low else 0.0
    out[:] = np.floor((corner - low) * scale + (0.5 if high > low else 128.0))
