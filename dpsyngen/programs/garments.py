"""Pieces of clothing composed of polygons: knowledge that the private images show garments (tier 2).

Proportions and shades were chosen by hand from what such things are, not measured on images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.base import Program
from dpsyngen.programs.checks import as_choice, as_number
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import below, fill_uniform, unit32, words32
from dpsyngen.programs.drawing.grounds import GROUNDS, ground_colour, ink_colour
from dpsyngen.programs.drawing.portable import cos_sin
from dpsyngen.programs.drawing.raster import add_segment, blend, fill_polygon, plain, to_levels
from dpsyngen.programs.registry import register

KINDS = ("top", "coat", "dress", "trousers", "shoe", "boot", "bag", "mixed")
TOP, COAT, DRESS, TROUSERS, SHOE, BOOT, BAG, MIXED = range(8)

_LAW = np.uint64(0x6761726D)  # "garm"
_POINTS = 32


@register("garments")
@dataclass(frozen=True, kw_only=True)
class Garments(Program):
    """One garment on plain ground with folds, stripes or a plain colour; anti-aliased.

    `params` gives ``kind`` and ``stripes`` (whether it has any).

    Attributes:
        kind: "top", "coat", "dress", "trousers", "shoe", "boot", "bag" or "mixed" (evenly).
        striped: probability of stripes; 0 to 1.
        ground: "black", "white" or "random"; the cloth stands out from it by 64 levels or more.

    Raises:
        ConfigError: a parameter is not allowed.
    """

    prior_tier: ClassVar[int] = 2

    kind: str = "mixed"
    striped: float = 0.3
    ground: str = "black"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_choice("kind", self.kind, KINDS, "a garment")
        object.__setattr__(self, "striped", as_number("striped", self.striped, 0.0, 1.0))
        as_choice("ground", self.ground, GROUNDS, "a ground")

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        draw(indices, np.uint64(self.seed), KINDS.index(self.kind), self.striped, GROUNDS.index(self.ground), out)

    def _params(self, index: int) -> dict[str, Any]:
        kind, stripes = law(np.uint64(self.seed), np.uint64(index), KINDS.index(self.kind), self.striped)
        return {"kind": KINDS[int(kind)], "stripes": bool(stripes)}


@compiled
def law(seed: np.uint64, index: np.uint64, kind: int, striped: float) -> tuple[int, bool]:
    """Kind of garment, and whether it has stripes."""
    a, b, _, _ = words32(seed, _LAW, index, np.uint64(0))
    if kind == MIXED:
        kind = below(a, MIXED)
    return kind, unit32(b) < striped


@compiled
def _put(xs: NDArray[np.float64], ys: NDArray[np.float64], count: int, x: float, y: float) -> int:
    xs[count] = x
    ys[count] = y
    return count + 1


@compiled
def _upper(kind: int, u: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]) -> int:
    """Right half of a top, coat or dress, from the neck around to the hem."""
    neck = 0.07 + 0.08 * u[0]
    shoulder = 0.22 + 0.08 * u[1]
    reach = 0.15 + 0.75 * u[2] if kind != DRESS else 0.25 * u[2]
    if kind == COAT:
        reach = 0.75 + 0.2 * u[2]
    chest = 0.17 + 0.07 * u[3]
    waist = chest * (0.75 + 0.35 * u[4])
    hem = chest * (0.9 + 0.3 * u[5]) if kind != DRESS else 0.14 + 0.24 * u[5]
    spread = 0.04 + 0.12 * u[6]  # how far sleeves stand off
    count = _put(xs, ys, 0, 0.0, -0.44 + 0.02 + 0.14 * u[7])
    count = _put(xs, ys, count, neck, -0.45)
    count = _put(xs, ys, count, shoulder, -0.40)
    if reach > 0.08:
        cuff_x = shoulder + 0.03 + spread * reach
        cuff_y = -0.40 + 0.82 * reach
        thick = 0.09 + 0.05 * u[8]
        count = _put(xs, ys, count, cuff_x, cuff_y)
        count = _put(xs, ys, count, cuff_x - thick, cuff_y + 0.02)
        count = _put(xs, ys, count, chest + 0.005, -0.22)
    else:
        count = _put(xs, ys, count, chest, -0.24)
    count = _put(xs, ys, count, waist, -0.02)
    count = _put(xs, ys, count, hem, 0.45)
    return _put(xs, ys, count, 0.0, 0.45)


@compiled
def _trousers(u: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]) -> int:
    waist = 0.12 + 0.05 * u[0]
    hip = waist + 0.03 + 0.04 * u[1]
    ankle = 0.10 + 0.14 * u[2]
    width = 0.06 + 0.06 * u[3]
    length = 0.45 - 0.35 * u[4] * (1.0 if u[5] < 0.3 else 0.0)
    count = _put(xs, ys, 0, 0.0, -0.45)
    count = _put(xs, ys, count, waist, -0.45)
    count = _put(xs, ys, count, hip, -0.22)
    count = _put(xs, ys, count, ankle + width * 0.5, length)
    count = _put(xs, ys, count, max(0.01, ankle - width), length)
    count = _put(xs, ys, count, 0.012, -0.12 + 0.05 * u[6])
    return _put(xs, ys, count, 0.0, -0.12 + 0.05 * u[6])


@compiled
def _footwear(kind: int, u: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]) -> int:
    """A whole shoe or boot from the side, toe to the right."""
    top = -0.06 - 0.1 * u[0] if kind == SHOE else -0.2 - 0.24 * u[0]
    sole = 0.14 + 0.05 * u[1]
    heel = 0.1 * u[2] * (1.0 if u[3] < 0.4 else 0.2)
    opening = -0.12 + 0.1 * u[4]
    toe = 0.02 + 0.08 * u[5]
    count = _put(xs, ys, 0, -0.42, sole + heel)
    count = _put(xs, ys, count, -0.44 + 0.04 * u[6], top + 0.1)
    count = _put(xs, ys, count, -0.40, top)
    count = _put(xs, ys, count, opening, top + 0.03 * u[7])
    count = _put(xs, ys, count, opening + 0.12, max(top + 0.06, -0.02))
    count = _put(xs, ys, count, 0.30, toe)
    count = _put(xs, ys, count, 0.43, toe + 0.06)
    count = _put(xs, ys, count, 0.45, sole)
    count = _put(xs, ys, count, 0.05, sole)
    count = _put(xs, ys, count, -0.18, sole - 0.4 * heel)
    return _put(xs, ys, count, -0.28, sole + heel)


@compiled
def _bag(u: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]) -> int:
    top = 0.28 + 0.14 * u[0]
    bottom = 0.30 + 0.14 * u[1]
    upper = -0.12 + 0.1 * u[2]
    count = _put(xs, ys, 0, 0.0, upper)
    count = _put(xs, ys, count, top, upper)
    count = _put(xs, ys, count, bottom, 0.36)
    count = _put(xs, ys, count, bottom - 0.04, 0.42)
    return _put(xs, ys, count, 0.0, 0.42)


@compiled
def _mirror(xs: NDArray[np.float64], ys: NDArray[np.float64], count: int) -> int:
    """Append the mirror image of a right half that starts and ends on the axis."""
    total = 2 * count - 2
    for k in range(count, total):
        xs[k] = -xs[total - k]
        ys[k] = ys[total - k]
    return total


@compiled
def _cloth(
    canvas: NDArray[np.float64],
    cover: NDArray[np.float64],
    ink: NDArray[np.float64],
    other: NDArray[np.float64],
    stripes: bool,
    u: NDArray[np.float64],
) -> None:
    """Fill with a colour that is darker to the sides and in folds, with stripes of another if wanted."""
    size = canvas.shape[1]
    period = 0.06 + 0.2 * u[0]
    cos, sin = cos_sin(0.0 if u[1] < 0.6 else 0.25)
    width = 0.2 + 0.4 * u[2]
    fold = 0.25 * u[3]
    bend, _ = cos_sin(u[4])
    for i in range(size):
        y = (i + 0.5) / size - 0.5
        for j in range(size):
            share = cover[i, j]
            if share <= 0.0:
                continue
            x = (j + 0.5) / size - 0.5
            wave, _ = cos_sin(6.0 * (x + 0.15 * bend * y) + u[5])
            light = (1.0 - 0.8 * x * x) * (1.0 - fold * (0.5 + 0.5 * wave))
            phase = (cos * y + sin * x) / period + u[6]
            phase -= np.floor(phase)
            for c in range(canvas.shape[0]):
                level = other[c] if stripes and phase < width else ink[c]
                canvas[c, i, j] += share * (light * level - canvas[c, i, j])


@compiled
def draw(
    indices: NDArray[np.uint64], seed: np.uint64, kind: int, striped: float, ground: int, out: NDArray[np.uint8]
) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    size = out.shape[2]
    grey = out.shape[1] == 1
    canvas = np.empty((out.shape[1], size, size))
    cover = np.empty((size, size))
    area = np.zeros((size, size + 1))
    xs = np.empty(_POINTS)
    ys = np.empty(_POINTS)
    u = np.empty(24)
    behind = np.empty(3)
    ink = np.empty(3)
    other = np.empty(3)
    dark = np.empty(3)
    for n in range(indices.shape[0]):
        index = indices[n]
        chosen, stripes = law(seed, index, kind, striped)
        fill_uniform(seed, _LAW, index, np.uint64(1), u)
        ground_colour(seed, index, ground, grey, behind)
        ink_colour(seed, index, 0, grey, behind, ink)
        ink_colour(seed, index, 1, grey, behind, other)
        dark[:] = 0.45 * ink
        plain(canvas, behind)
        if chosen == TROUSERS:
            count = _mirror(xs, ys, _trousers(u, xs, ys))
        elif chosen == BAG:
            count = _mirror(xs, ys, _bag(u, xs, ys))
        elif SHOE <= chosen <= BOOT:
            count = _footwear(chosen, u, xs, ys)
        else:
            count = _mirror(xs, ys, _upper(chosen, u, xs, ys))
        scale = size * (0.85 + 0.15 * u[22])
        left = 0.5 * size + 0.04 * size * (u[21] - 0.5)
        middle = 0.5 * size + 0.04 * size * (u[20] - 0.5)
        flip = -1.0 if u[23] < 0.5 else 1.0
        top = 1.0
        for k in range(count):
            top = min(top, ys[k])
            xs[k] = left + flip * scale * xs[k]
            ys[k] = middle + scale * ys[k]
        if chosen == BAG:  # the handle lies behind
            cover[:] = 0.0
            reach = 0.10 + 0.12 * u[9]
            rise = 0.2 + 0.18 * u[10]
            half = scale * (0.012 + 0.02 * u[11])
            x, y = left - scale * reach, middle + scale * top
            for piece in range(1, 13):
                cos, sin = cos_sin(0.5 - piece / 24)
                x_next = left + scale * reach * cos
                y_next = middle + scale * (top - rise * sin)
                add_segment(cover, x, y, x_next, y_next, half, half)
                x, y = x_next, y_next
            blend(canvas, cover, dark)
        fill_polygon(xs, ys, count, area, cover)
        _cloth(canvas, cover, ink, other, stripes, u[12:20])
        cover[:] = 0.0
        if chosen == COAT:
            half = 0.006 * size
            add_segment(cover, left, middle - 0.3 * scale, left, middle + 0.45 * scale, half, half)
            for k in range(4):
                y = middle + scale * (-0.15 + 0.14 * k)
                add_segment(cover, left + 0.03 * scale, y, left + 0.03 * scale, y, 0.012 * size, 0.012 * size)
            blend(canvas, cover, dark)
        elif SHOE <= chosen <= BOOT:
            sole = middle + scale * (0.14 + 0.05 * u[1])
            half = 0.014 * size
            add_segment(cover, left - flip * 0.42 * scale, sole, left + flip * 0.45 * scale, sole, half, half)
            blend(canvas, cover, dark if u[8] < 0.5 else other)
        to_levels(canvas, out[n])
