"""Dead leaves: random shapes painted over each other until nothing of the ground shows.

Sources: the model is Matheron's; the r⁻³ law, which makes images scale-invariant with a power spectrum ≈
1/f², is in Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001.  The variant here, its
shapes and radius law are those of Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963,
as used by Choi et al., arXiv 2412.09842.  Written from those descriptions.

A leaf has a centre uniform in the canvas, and a *circumradius* r: discs have radius r, and the corners of all
other shapes lie on the circle of radius r around the centre.

=================  ======================================================================================
disc               radius r
square             axis-aligned, side r√2
oriented-square    the same, turned by a uniform angle
rectangle          axis-aligned, half-sides r·|cos θ| and r·|sin θ| with θ uniform
triangle           corners at three independent uniform angles
quadrilateral      corners at four independent uniform angles, joined in order of angle
mixed              each leaf one of the six above, uniformly
=================  ======================================================================================

Where we differ from the published programs: radii and centres are continuous (theirs are rounded to whole
pixels), and there is no cap on the number of leaves, so no image has holes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program, as_indices
from dpsyngen.programs.compiled import compiled
from dpsyngen.programs.counter_rng import to_unit, unit_vector, words
from dpsyngen.programs.registry import register
from dpsyngen.programs.scanline import EMPTY, fill_convex, fill_disc, fill_pixel_at, fill_rectangle

SHAPES = ("disc", "square", "oriented-square", "rectangle", "triangle", "quadrilateral", "mixed")
COLOURS = ("grey", "rgb", "black-white")

_DISC, _SQUARE, _ORIENTED_SQUARE, _RECTANGLE, _TRIANGLE, _QUADRILATERAL, _MIXED = range(7)
_GREY, _RGB, _BLACK_WHITE = range(3)

_STREAM = np.uint64(0x6C656166)  # "leaf"
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_32 = np.uint64(32)
_SHAPE_COUNT = np.uint64(6)
_COLOUR_BITS = np.uint64(0xFFFFFF)
_ROOT_HALF = 0.7071067811865476
_SMALL_STEP = 1e-9


@register("dead-leaves")
@dataclass(frozen=True, kw_only=True)
class DeadLeaves(Program):
    """Dead leaves of density ∝ r⁻³ − r_max⁻³ on [r_min, r_max]; see the module for the law and its sources.

    Attributes:
        shape: "disc" (or "circle"), "square", "oriented-square", "rectangle", "triangle", "quadrilateral" or
            "mixed".
        colour: law of a leaf's colour.  "grey": one level uniform on 0…255; "black-white": 0 or 255, evenly;
            "rgb": three independent uniform levels, needs channels=3.  The first two repeat their level when
            channels=3.  None, the default, means "grey" for 1 channel and "rgb" for 3.
        r_min, r_max: range of the circumradius as fractions of the resolution, 0 < r_min < r_max ≤ 1.

    Raises:
        ConfigError: a parameter is not allowed.
    """

    prior_tier: ClassVar[int] = 0

    shape: str = "mixed"
    colour: str | None = None
    r_min: float = 0.03
    r_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape == "circle":  # the literature's name for it
            object.__setattr__(self, "shape", "disc")
        if self.shape not in SHAPES:
            raise ConfigError(f"shape={self.shape!r} is not a shape: choose one of {', '.join(SHAPES)}.")
        if self.colour is None:
            object.__setattr__(self, "colour", "grey" if self.channels == 1 else "rgb")
        if self.colour not in COLOURS:
            raise ConfigError(f"colour={self.colour!r} is not a colour law: choose one of {', '.join(COLOURS)}.")
        if self.colour == "rgb" and self.channels == 1:
            raise ConfigError(
                "colour='rgb' needs 3 channels, and channels=1 was given: "
                "choose channels=3, or colour='grey' or 'black-white'."
            )
        for key in ("r_min", "r_max"):
            object.__setattr__(self, key, _as_fraction(key, getattr(self, key)))
        if not self.r_min < self.r_max:
            raise ConfigError(
                f"r_min={self.r_min} and r_max={self.r_max} leave no radius between them: "
                "give 0 < r_min < r_max ≤ 1 (fractions of the resolution; published: 0.03 and 1)."
            )

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        draw(indices, *self._law(), out, np.empty(len(indices), dtype=np.int64))

    def _law(self) -> tuple[np.uint64, int, int, float, float]:
        assert self.colour is not None  # set by __post_init__
        return (
            np.uint64(self.seed),
            SHAPES.index(self.shape),
            COLOURS.index(self.colour),
            self.r_min,
            self.r_max,
        )

    def leaf_counts(self, indices: ArrayLike) -> NDArray[np.int64]:
        """How many leaves each image took until no ground showed, int64 [N]; to study law and cost."""
        chosen = as_indices(indices)
        out = np.empty((len(chosen), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        leaves = np.empty(len(chosen), dtype=np.int64)
        draw(chosen, *self._law(), out, leaves)
        return leaves


def _as_fraction(key: str, value: Any) -> float:
    allowed = "give a number above 0 and at most 1 (a fraction of the resolution)."
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={value!r} is not a number: {allowed}") from None
    if not 0.0 < number <= 1.0:  # false for NaN too
        raise ConfigError(f"{key}={number} is out of range: {allowed}")
    return number


@compiled
def leaf_radius(v: float, r_min: float, r_max: float) -> float:
    """The radius that a share v of leaves exceeds: inverse of 1 − CDF of the density ∝ r⁻³ − r_max⁻³.

    v is in [0, 1], and the result runs from r_max at v = 0 down to r_min at v = 1.

    With t = r_max/r − 1 the law 1 − CDF = v reads t²(t + 3) / (1 + t) = d, where d is v times its left side
    at r_min.  Newton's method on the cubic t²(t + 3) − d(1 + t), which is convex for t ≥ 0, from the lower of
    two upper bounds of its root (by (t + 3)/(1 + t) ≥ 1, and by rewriting the law as
    (1 + t)² = d + 3 − 2/(1 + t)), so t only falls.  The steps stop when the next, of square size, would be
    below rounding.  No table, and IEEE operations only.
    """
    top = r_max / r_min - 1.0
    d = v * (top * top * (top + 3.0) / (1.0 + top))
    if d <= 0.0:
        return r_max
    t = min(math.sqrt(d), math.sqrt(d + 3.0) - 1.0)
    step = t
    while step > _SMALL_STEP * t:
        step = (t * t * (t + 3.0) - d * (1.0 + t)) / (3.0 * t * t + 6.0 * t - d)
        t -= step
    return max(r_min, r_max / (1.0 + t))


@compiled
def _corner_angle(x: float, y: float) -> float:
    """Increases with the angle of (x, y), from 0 to 4; exact where arctan is not."""
    share = y / (abs(x) + abs(y))
    if x < 0.0:
        return 2.0 - share
    return share if y >= 0.0 else 4.0 + share


@compiled
def _corners_on_circle(
    seed: np.uint64,
    index: np.uint64,
    block: np.uint64,
    xs: NDArray[np.float64],
    ys: NDArray[np.float64],
    corners: int,
) -> np.uint64:
    """Fill xs, ys with 3 or 4 uniform directions in cyclic order; returns the first block not used."""
    for k in range(corners):
        xs[k], ys[k], block = unit_vector(seed, _STREAM, index, block)
    if corners == 4:  # any order of three is cyclic
        for k in range(1, 4):
            x, y = xs[k], ys[k]
            angle = _corner_angle(x, y)
            place = k
            while place > 0 and _corner_angle(xs[place - 1], ys[place - 1]) > angle:
                xs[place] = xs[place - 1]
                ys[place] = ys[place - 1]
                place -= 1
            xs[place] = x
            ys[place] = y
    return block


@compiled
def _paint_polygon(
    canvas: NDArray[np.int32],
    x: float,
    y: float,
    radius: float,
    xs: NDArray[np.float64],
    ys: NDArray[np.float64],
    corners: int,
    value: int,
) -> tuple[int, int]:
    """Paint the polygon with corners (x, y) + radius·(xs, ys), which are moved there.

    A sliver that misses every pixel centre gets the pixel under the mean of its corners.
    """
    middle_x = 0.0
    middle_y = 0.0
    for k in range(corners):
        xs[k] = x + radius * xs[k]
        ys[k] = y + radius * ys[k]
        middle_x += xs[k] / corners
        middle_y += ys[k] / corners
    painted, fresh = fill_convex(canvas, xs, ys, corners, value)
    if painted == 0:
        painted, fresh = fill_pixel_at(canvas, middle_x, middle_y, value)
    return painted, fresh


@compiled
def _leaf_value(bits: np.uint64, colour: int) -> int:
    """24 random bits as red | green << 8 | blue << 16 under a colour law."""
    packed = int(bits)
    if colour == _GREY:
        return (packed & 0xFF) * 0x010101
    if colour == _BLACK_WHITE:
        return (packed & 1) * 0xFFFFFF
    return packed


@compiled
def _cover(
    canvas: NDArray[np.int32],
    seed: np.uint64,
    index: np.uint64,
    shape: int,
    colour: int,
    r_min: float,
    r_max: float,
    xs: NDArray[np.float64],
    ys: NDArray[np.float64],
) -> int:
    """Paint leaves, later over earlier, until no pixel is empty; returns their number.

    Ends with probability 1, and soon: a leaf never vanishes (one too small or thin to hold a pixel centre
    paints the pixel under its middle), and every pixel has a chance with each leaf.
    """
    size = canvas.shape[0]
    canvas[:] = EMPTY
    empty = size * size
    leaves = 0
    block = _ZERO
    while empty > 0:
        word_x, word_y = words(seed, _STREAM, index, block)
        word_radius, word_kind = words(seed, _STREAM, index, block + _ONE)
        block = block + _ONE + _ONE
        x = to_unit(word_x) * size
        y = to_unit(word_y) * size
        radius = leaf_radius(to_unit(word_radius), r_min, r_max) * size
        value = _leaf_value(word_kind & _COLOUR_BITS, colour)
        kind = shape
        if shape == _MIXED:  # the high 32 bits scaled to 0…5: uniform to 1 part in 2³⁰
            kind = int(((word_kind >> _32) * _SHAPE_COUNT) >> _32)

        painted, fresh = 0, 0
        if kind == _DISC:
            painted, fresh = fill_disc(canvas, x, y, radius, value)
        elif kind == _SQUARE:
            half = radius * _ROOT_HALF
            painted, fresh = fill_rectangle(canvas, x, y, half, half, value)
        elif kind == _RECTANGLE:
            cos, sin, block = unit_vector(seed, _STREAM, index, block)
            painted, fresh = fill_rectangle(canvas, x, y, radius * abs(cos), radius * abs(sin), value)
        elif kind == _ORIENTED_SQUARE:
            cos, sin, block = unit_vector(seed, _STREAM, index, block)
            xs[0], xs[1], xs[2], xs[3] = cos, -sin, -cos, sin
            ys[0], ys[1], ys[2], ys[3] = sin, cos, -sin, -cos
            painted, fresh = _paint_polygon(canvas, x, y, radius, xs, ys, 4, value)
        else:
            corners = 3 if kind == _TRIANGLE else 4
            block = _corners_on_circle(seed, index, block, xs, ys, corners)
            painted, fresh = _paint_polygon(canvas, x, y, radius, xs, ys, corners, value)
        if painted == 0 and kind in (_DISC, _SQUARE, _RECTANGLE):
            painted, fresh = fill_pixel_at(canvas, x, y, value)
        empty -= fresh
        leaves += 1
    return leaves


@compiled
def draw(
    indices: NDArray[np.uint64],
    seed: np.uint64,
    shape: int,
    colour: int,
    r_min: float,
    r_max: float,
    out: NDArray[np.uint8],
    leaves: NDArray[np.int64],
) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, H, W], and its number of leaves into ``leaves[n]``."""
    channels = out.shape[1]
    size = out.shape[2]
    canvas = np.empty((size, size), dtype=np.int32)
    xs = np.empty(4, dtype=np.float64)
    ys = np.empty(4, dtype=np.float64)
    for n in range(indices.shape[0]):
        leaves[n] = _cover(canvas, seed, indices[n], shape, colour, r_min, r_max, xs, ys)
        for c in range(channels):
            for i in range(size):
                for j in range(size):
                    out[n, c, i, j] = (canvas[i, j] >> (8 * c)) & 0xFF
