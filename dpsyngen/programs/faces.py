"""Face-like pictures composed of ellipses and strokes: knowledge that the private images show faces (tier 2).

Proportions and colours were chosen by hand: skin and hair are uniform between a light and a dark colour that we named,
nothing was measured on photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.base import Program
from dpsyngen.programs.checks import as_choice, as_number
from dpsyngen.programs.drawing.colours import uniform_colour
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import fill_uniform
from dpsyngen.programs.drawing.grounds import GROUNDS, ground_colour
from dpsyngen.programs.drawing.portable import cos_sin
from dpsyngen.programs.drawing.raster import add_segment, blend, blend_gradient, fill_polygon, plain, to_levels
from dpsyngen.programs.registry import register

_LAW = np.uint64(0x66616365)  # "face"
_POINTS = 48
_NAMES = {"head_width": 0, "head_height": 1, "turn": 2, "smile": 3, "hair_length": 4, "light": 5}
_SKIN = np.array([[255.0, 226.0, 200.0], [70.0, 42.0, 26.0]])
_HAIR = np.array([[235.0, 205.0, 140.0], [18.0, 14.0, 12.0]])


@register("faces")
@dataclass(frozen=True, kw_only=True)
class Faces(Program):
    """Head and shoulders with hair, eyes, brows, nose and mouth; anti-aliased.

    `params` gives ``head_width``, ``head_height``, ``turn`` (to the side), ``smile``, ``hair_length`` and ``light`` as
    shares from 0 to 1 of their ranges.

    Attributes:
        turn: how far heads may turn to the side; 0 (all look ahead) to 1.
        ground: "black", "white" or "random".

    Raises:
        ConfigError: a parameter is not allowed.
    """

    prior_tier: ClassVar[int] = 2

    turn: float = 0.6
    ground: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "turn", as_number("turn", self.turn, 0.0, 1.0))
        as_choice("ground", self.ground, GROUNDS, "a ground")

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        draw(indices, np.uint64(self.seed), self.turn, GROUNDS.index(self.ground), out)

    def _params(self, index: int) -> dict[str, Any]:
        u = np.empty(40)
        fill_uniform(np.uint64(self.seed), _LAW, np.uint64(index), np.uint64(0), u)
        return {name: float(u[k]) for name, k in _NAMES.items()}


@compiled
def _ellipse(
    x: float, y: float, a: float, b: float, squareness: float, xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> None:
    """An ellipse whose lower half is narrowed towards a chin by `squareness` < 0, or widened."""
    for k in range(_POINTS):
        cos, sin = cos_sin(k / _POINTS)
        narrow = 1.0 + squareness * max(0.0, sin)
        xs[k] = x + a * cos * narrow
        ys[k] = y + b * sin


@compiled
def _between(ends: NDArray[np.float64], share: float, grey: bool, out: NDArray[np.float64]) -> None:
    for c in range(3):
        out[c] = ends[0, c] + share * (ends[1, c] - ends[0, c])
    if grey:
        out[:] = (out[0] + out[1] + out[2]) / 3.0


@compiled
def draw(indices: NDArray[np.uint64], seed: np.uint64, largest: float, ground: int, out: NDArray[np.uint8]) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    size = float(out.shape[2])
    side = out.shape[2]
    grey = out.shape[1] == 1
    canvas = np.empty((out.shape[1], side, side))
    cover = np.empty((side, side))
    area = np.zeros((side, side + 1))
    xs = np.empty(_POINTS)
    ys = np.empty(_POINTS)
    u = np.empty(40)
    behind = np.empty(3)
    skin = np.empty(3)
    shade = np.empty(3)
    hair = np.empty(3)
    cloth = np.empty(3)
    iris = np.empty(3)
    lips = np.empty(3)
    white = np.full(3, 245.0)
    black = np.full(3, 15.0)
    for n in range(indices.shape[0]):
        index = indices[n]
        fill_uniform(seed, _LAW, index, np.uint64(0), u)
        ground_colour(seed, index, ground, grey, behind)
        _between(_SKIN, u[6], grey, skin)
        _between(_HAIR, u[7], grey, hair)
        uniform_colour(u[8], u[9], u[10], grey, cloth)
        uniform_colour(0.6 * u[11], 0.2 + 0.4 * u[12], 0.2 + 0.6 * u[13], grey, iris)
        shade[:] = 0.72 * skin
        lips[0], lips[1], lips[2] = 0.85 * skin[0], 0.55 * skin[1], 0.55 * skin[2]
        plain(canvas, behind)
        wide = size * (0.21 + 0.07 * u[0])
        high = size * (0.29 + 0.07 * u[1])
        x = size * (0.5 + 0.06 * (u[14] - 0.5))
        y = size * (0.47 + 0.06 * (u[15] - 0.5))
        turn = largest * (2.0 * u[2] - 1.0)
        cos, sin = cos_sin(u[5])

        # Hair behind the head, shoulders, neck
        length = u[4]
        _ellipse(x, y - 0.08 * high + 0.5 * length * high, 1.22 * wide, (1.05 + 0.45 * length) * high, 0.1, xs, ys)
        fill_polygon(xs, ys, _POINTS, area, cover)
        blend(canvas, cover, hair)
        _ellipse(x, y + 2.05 * high, size * (0.36 + 0.12 * u[16]), 0.75 * high, 0.0, xs, ys)
        fill_polygon(xs, ys, _POINTS, area, cover)
        blend(canvas, cover, cloth)
        cover[:] = 0.0
        neck = 0.42 * wide
        add_segment(cover, x, y + 0.7 * high, x, y + 1.25 * high, neck, neck)
        blend(canvas, cover, shade)

        # Head, lit from a side
        _ellipse(x, y, wide, high, -0.12 - 0.2 * u[17], xs, ys)
        fill_polygon(xs, ys, _POINTS, area, cover)
        blend_gradient(canvas, cover, skin, shade, cos, sin)

        # Hair over the forehead
        fringe = 0.35 + 0.3 * u[18]
        for k in range(_POINTS):
            c, s = cos_sin(k / _POINTS)
            xs[k] = x + 1.12 * wide * c
            ys[k] = (
                y
                - 0.1 * high
                + high * (1.0 if s < 0.0 else -fringe * (1.0 - 0.35 * abs(c))) * (s if s < 0.0 else 1.0 - 0.6 * abs(c))
            )
        fill_polygon(xs, ys, _POINTS, area, cover)
        blend(canvas, cover, hair)

        # Eyes and brows
        shift = 0.3 * wide * turn
        eye_y = y - 0.02 * high
        eye = wide * (0.15 + 0.06 * u[19])
        for k in range(2):
            direction = -1.0 if k == 0 else 1.0
            eye_x = x + shift + direction * wide * 0.42 * (1.0 - 0.25 * direction * turn)
            _ellipse(eye_x, eye_y, eye, eye * (0.4 + 0.25 * u[20]), 0.0, xs, ys)
            fill_polygon(xs, ys, _POINTS, area, cover)
            blend(canvas, cover, white)
            look = 0.3 * eye * (2.0 * u[21] - 1.0)
            _ellipse(eye_x + look, eye_y, 0.45 * eye, 0.45 * eye, 0.0, xs, ys)
            fill_polygon(xs, ys, _POINTS, area, cover)
            blend(canvas, cover, iris)
            _ellipse(eye_x + look, eye_y, 0.2 * eye, 0.2 * eye, 0.0, xs, ys)
            fill_polygon(xs, ys, _POINTS, area, cover)
            blend(canvas, cover, black)
            cover[:] = 0.0
            brow = eye_y - high * (0.14 + 0.06 * u[22])
            tilt = high * 0.05 * (2.0 * u[23] - 1.0)
            half = size * (0.006 + 0.01 * u[24])
            add_segment(
                cover,
                eye_x - direction * eye,
                brow + tilt,
                eye_x + direction * 1.2 * eye,
                brow - tilt,
                half,
                0.6 * half,
            )
            blend(canvas, cover, hair)

        # Nose and mouth
        cover[:] = 0.0
        nose_y = y + high * (0.28 + 0.08 * u[25])
        add_segment(cover, x + 1.2 * shift, y + 0.05 * high, x + 1.6 * shift, nose_y, 0.008 * size, 0.016 * size)
        add_segment(
            cover, x + 1.3 * shift - 0.1 * wide, nose_y, x + 1.3 * shift + 0.1 * wide, nose_y, 0.01 * size, 0.01 * size
        )
        blend(canvas, cover, shade)
        cover[:] = 0.0
        mouth_y = y + high * (0.52 + 0.08 * u[26])
        reach = wide * (0.28 + 0.2 * u[27])
        smile = high * 0.1 * (2.0 * u[3] - 0.6)
        thick = size * (0.008 + 0.018 * u[28])
        before_x = x + shift - reach
        before_y = mouth_y - smile
        for piece in range(1, 9):
            t = piece / 4.0 - 1.0
            next_x = x + shift + t * reach
            next_y = mouth_y - smile * t * t
            add_segment(cover, before_x, before_y, next_x, next_y, thick * (1.2 - abs(t)), thick * (1.2 - abs(t)))
            before_x, before_y = next_x, next_y
        blend(canvas, cover, lips)
        to_levels(canvas, out[n])
