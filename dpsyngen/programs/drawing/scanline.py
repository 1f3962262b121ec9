"""Painting discs, rectangles and convex polygons onto a small canvas, row by row.

A canvas is int32 [H, W]; pixel (row i, column j) is painted when its centre (x, y) = (j + ½, i + ½) lies in
the shape, and a negative value marks a pixel that nothing has been painted on.  No anti-aliasing: a pixel has
one owner.  Every function returns (pixels painted, of those previously unpainted) and clips to the canvas.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.drawing.compiled import compiled

EMPTY = -1


@compiled
def fill_span(canvas: NDArray[np.int32], row: int, left: float, right: float, value: int) -> tuple[int, int]:
    """Paint the pixels of `row` whose centres have left ≤ x < right."""
    start = max(0, math.ceil(left - 0.5))
    stop = min(canvas.shape[1], math.ceil(right - 0.5))
    fresh = 0
    for column in range(start, stop):
        if canvas[row, column] < 0:
            fresh += 1
        canvas[row, column] = value
    return max(0, stop - start), fresh


@compiled
def fill_disc(canvas: NDArray[np.int32], x: float, y: float, radius: float, value: int) -> tuple[int, int]:
    """Paint the disc of centre (x, y)."""
    painted = 0
    fresh = 0
    first = max(0, math.ceil(y - radius - 0.5))
    stop = min(canvas.shape[0], math.ceil(y + radius - 0.5))
    for row in range(first, stop):
        height = row + 0.5 - y
        half = math.sqrt(max(0.0, radius * radius - height * height))
        more, new = fill_span(canvas, row, x - half, x + half, value)
        painted += more
        fresh += new
    return painted, fresh


@compiled
def fill_rectangle(
    canvas: NDArray[np.int32], x: float, y: float, half_width: float, half_height: float, value: int
) -> tuple[int, int]:
    """Paint the axis-aligned rectangle of centre (x, y)."""
    painted = 0
    fresh = 0
    first = max(0, math.ceil(y - half_height - 0.5))
    stop = min(canvas.shape[0], math.ceil(y + half_height - 0.5))
    for row in range(first, stop):
        more, new = fill_span(canvas, row, x - half_width, x + half_width, value)
        painted += more
        fresh += new
    return painted, fresh


@compiled
def fill_convex(
    canvas: NDArray[np.int32], xs: NDArray[np.float64], ys: NDArray[np.float64], corners: int, value: int
) -> tuple[int, int]:
    """Paint the convex polygon whose first `corners` vertices (xs, ys) are in cyclic order."""
    painted = 0
    fresh = 0
    low = ys[0]
    high = ys[0]
    for k in range(1, corners):
        low = min(low, ys[k])
        high = max(high, ys[k])
    first = max(0, math.ceil(low - 0.5))
    stop = min(canvas.shape[0], math.ceil(high - 0.5))
    for row in range(first, stop):
        y = row + 0.5
        left = math.inf
        right = -math.inf
        x_end = xs[corners - 1]
        y_end = ys[corners - 1]
        for k in range(corners):
            x_start, y_start = x_end, y_end
            x_end, y_end = xs[k], ys[k]
            if (y_start <= y) != (y_end <= y):
                x = x_start + (y - y_start) * (x_end - x_start) / (y_end - y_start)
                left = min(left, x)
                right = max(right, x)
        if left < right:
            more, new = fill_span(canvas, row, left, right, value)
            painted += more
            fresh += new
    return painted, fresh


@compiled
def fill_pixel_at(canvas: NDArray[np.int32], x: float, y: float, value: int) -> tuple[int, int]:
    """Paint the one pixel that contains the point (x, y), if it is on the canvas."""
    row = math.floor(y)
    column = math.floor(x)
    if not (0 <= row < canvas.shape[0] and 0 <= column < canvas.shape[1]):
        return 0, 0
    fresh = 1 if canvas[row, column] < 0 else 0
    canvas[row, column] = value
    return 1, fresh
