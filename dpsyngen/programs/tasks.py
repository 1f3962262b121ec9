"""Families: an endless stream of programs, each with its own look, for networks that are to work on a set never seen.

Family f draws one to four random figures (closed contours or strokes) and varies them from image to image: smooth
warps, turns, shifts, brightness, texture, ground and ink.  Every sixth family is another program as it is.  A network
that is trained on many families cannot learn one of them by heart: it learns what all of them share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import MAX_RESOLUTION, Program, as_integer, param
from dpsyngen.programs.drawing import Floats, Images, Word, Words
from dpsyngen.programs.drawing.counter_rng import fill_uniform, words
from dpsyngen.programs.drawing.portable import compiled, cos_sin
from dpsyngen.programs.registry import make_program, register

MAX_FIGURES = 4
WHOLE_EVERY = 6  # of so many families, one is a program as it is
_WAVES = 3  # of a warp, along each side

_LAW = np.uint64(0x66616D69)  # "fami"
_IMAGE = np.uint64(0x66696D61)  # "fima"

# Where figures come from.  They are drawn white on black: what is drawn is how much ink covers a point.
FIGURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("contours", {"shape": "mirrored", "figures": 1, "upright": True, "radius": (0.35, 0.5), "outline": 0.1}),
    ("contours", {"shape": "superellipse", "figures": (1, 2), "upright": True, "radius": (0.3, 0.5), "outline": 0.1}),
    ("contours", {"figures": (1, 3), "radius": (0.2, 0.48)}),
    ("contours", {"shape": "polygon", "figures": (1, 3), "radius": (0.2, 0.48)}),
    ("contours", {"figures": (3, 6), "radius": (0.08, 0.3)}),
    ("strokes", {"strokes": (1, 3)}),
    ("strokes", {"strokes": (2, 6), "width": (0.06, 0.2)}),
)
WHOLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dead-leaves", {}),
    ("dead-leaves", {"r_min": 0.1}),
    ("contours", {}),
    ("contours", {"ground": "random"}),
    ("strokes", {}),
    ("strokes", {"ground": "random"}),
    ("fractal", {}),
    ("smooth-noise", {}),
    ("spectrum", {}),
    ("wavelet-marginal", {}),
)
TEXTURES = ("spectrum", "smooth-noise", "dead-leaves", "wavelet-marginal")

# Numbers of a family, uniform in [0, 1), by place.
(_COUNT, _WARP, _TURN, _STRETCH, _SHIFT, _DIM, _DIMMEST, _TEXTURE, _TEXTURED, _TEXTURE_KIND) = range(10)
(_GROUND, _GROUND_LEVEL, _INVERT, _SECOND, _GLOSS, _SPIN, _JITTER, _PLAIN) = range(10, 18)
_SATURATION = 18
_COLOURS = 19  # three of the ground, then three of each figure
_NUMBERS = _COLOURS + 3 * (1 + MAX_FIGURES)
_UNTEXTURED, _TEXTURED_GROUND = 0.4, 0.85  # families below and above these
_PER_IMAGE = 2 * _WAVES**2 + 24  # numbers of an image


@register("family")
@dataclass(frozen=True, kw_only=True)
class Family(Program):
    """One family of the endless stream: image i is a pure function of (seed, number, i), as of any program.

    Attributes:
        number: of the family, 0 to 2⁶³ − 1; every sixth, 5, 11, …, is another program with its own seed.
    """

    prior_tier: ClassVar[int] = 1

    number: int = param(0, as_integer, 0, 2**63 - 1)

    @property
    def whole(self) -> Program | None:
        """The program that this family is, or None where it is made of figures."""
        if self.number % WHOLE_EVERY != WHOLE_EVERY - 1:
            return None
        name, options = WHOLE[self.number // WHOLE_EVERY % len(WHOLE)]
        return make_program(name, **self._inner(0), **options)

    def _inner(self, part: int, **changed: Any) -> dict[str, Any]:
        """Resolution, channels and a seed that depends on the family and on what is drawn."""
        seed, _ = words(np.uint64(self.seed), _LAW, np.uint64(self.number), np.uint64(1_000 + part))
        return {"resolution": self.resolution, "channels": self.channels, "seed": int(seed)} | changed

    def _draw(self, indices: Words, out: Images) -> None:
        self.draw(indices, None, out)

    def draw(self, indices: Words, ground: Images | None, out: Images) -> None:
        """Write images to `out`, uint8 [N, C, S, S]; its figures, if it has any, lie before `ground`."""
        whole = self.whole
        if whole is not None:
            out[:] = whole.batch(indices)
            return
        law, figures = _figures(self.seed, self.number, self.resolution)
        if ground is not None:
            law = law.copy()
            law[_GROUND], law[_TEXTURED], textures = 1.0, 0.0, ground
        elif law[_TEXTURED] < _UNTEXTURED and law[_GROUND] <= _TEXTURED_GROUND:
            textures = np.zeros_like(out)  # none is seen
        else:
            kind = TEXTURES[int(law[_TEXTURE_KIND] * len(TEXTURES))]
            textures = make_program(kind, **self._inner(1)).batch(indices)
        compose(indices, np.uint64(self.seed), np.uint64(self.number), law, figures, textures, out)


@functools.lru_cache(maxsize=64)
def _figures(seed: int, number: int, resolution: int) -> tuple[Floats, Floats]:
    """The numbers of a family, and its figures [K, S, S] in 0..1 at twice the resolution, with a margin."""
    law = np.empty(_NUMBERS)
    fill_uniform(np.uint64(seed), _LAW, np.uint64(number), np.uint64(0), law)
    size = min(max(2 * resolution, 32), MAX_RESOLUTION)
    figures = []
    for k in range(1 + int(law[_COUNT] * MAX_FIGURES)):
        inner, choice = words(np.uint64(seed), _LAW, np.uint64(number), np.uint64(2_000 + k))
        name, options = FIGURES[int(choice % np.uint64(len(FIGURES)))]
        program = make_program(name, resolution=size, channels=1, seed=int(inner), **options)
        figures.append(program.batch([0])[0, 0] / 255.0)
    return law, np.pad(np.stack(figures), ((0, 0), (1, 1), (1, 1)))


@compiled
def _spread(u: float) -> float:
    """A uniform number in [0, 1) as one of mean 0 and standard deviation 1."""
    return 3.4641016151377544 * (u - 0.5)


@compiled
def _cover(figure: Floats, x: float, y: float) -> float:
    """How much ink there is at (x, y) in [-1, 1]², linear between pixels, none outside."""
    inner = figure.shape[0] - 2
    px = (x + 1.0) * 0.5 * inner + 0.5
    py = (y + 1.0) * 0.5 * inner + 0.5
    if not (0.0 <= px < inner + 1.0 and 0.0 <= py < inner + 1.0):
        return 0.0
    j, i = int(px), int(py)
    px -= j
    py -= i
    upper = (1.0 - px) * figure[i, j] + px * figure[i, j + 1]
    lower = (1.0 - px) * figure[i + 1, j] + px * figure[i + 1, j + 1]
    return float((1.0 - py) * upper + py * lower)


@compiled
def _draw_ink(figure: Floats, law: Floats, numbers: Floats, out: Floats) -> None:
    """Set `out` [S, S] to the cover of a warped figure; `numbers` say how it is turned, stretched, shifted."""
    size = out.shape[0]
    turn = (0.5 if law[_SPIN] < 0.1 else 0.005 + 0.05 * law[_TURN] * law[_TURN]) * 2.0 * (numbers[0] - 0.5)
    cos, sin = cos_sin(turn)
    stretch = 0.02 + 0.14 * law[_STRETCH]
    a = 1.0 + stretch * _spread(numbers[1])
    d = 1.0 + stretch * _spread(numbers[2])
    b = stretch * _spread(numbers[3])
    shift = 0.02 + 0.16 * law[_SHIFT] * law[_SHIFT]
    right = shift * _spread(numbers[4])
    down = shift * _spread(numbers[5])
    # A smooth displacement: a few cosines of random size along both sides, the finer the weaker.
    strength = 0.01 + 0.09 * law[_WARP]
    waves = np.empty((2, _WAVES, _WAVES))
    for p in range(_WAVES):
        for q in range(_WAVES):
            scale = strength / (1.0 + p + q)
            for side in range(2):
                waves[side, p, q] = scale * _spread(numbers[6 + (side * _WAVES + p) * _WAVES + q])
    fine = 2 * size  # points along a side: four for a pixel
    table = np.empty((fine, _WAVES))
    for i in range(fine):
        for p in range(_WAVES):
            table[i, p], _ = cos_sin(0.5 * p * (i + 0.5) / fine)
    for i in range(size):
        for j in range(size):
            total = 0.0
            for corner in range(4):
                fi = 2 * i + corner // 2
                fj = 2 * j + corner % 2
                u = (2 * fj + 1.0) / fine - 1.0 - right
                v = (2 * fi + 1.0) / fine - 1.0 - down
                for p in range(_WAVES):
                    for q in range(_WAVES):
                        wave = table[fi, p] * table[fj, q]
                        u += waves[0, p, q] * wave
                        v += waves[1, p, q] * wave
                x = a * (cos * u + sin * v) + b * v
                y = d * (cos * v - sin * u)
                total += _cover(figure, x, y)
            out[i, j] = 0.25 * total


@compiled
def compose(
    indices: Words, seed: Word, number: Word, law: Floats, figures: Floats, textures: Images, out: Images
) -> None:
    """Write the images of a family to `out`, uint8 [N, C, S, S]; ``textures[n]`` is drawn for image n."""
    channels, size = out.shape[1], out.shape[2]
    numbers = np.empty(_PER_IMAGE)
    again = np.empty(_PER_IMAGE)
    first = np.empty((size, size))
    second = np.empty((size, size))
    ink = np.empty((2, 3))
    ground = np.empty(3)
    two = law[_SECOND] < 0.3
    own, _ = words(seed, _IMAGE, number, np.uint64(0))  # seeds of the images' numbers: the first says which figure
    other, _ = words(seed, _IMAGE, ~number, np.uint64(0))
    jitter = 0.35 * law[_JITTER] * law[_JITTER]  # of colours between images
    for n in range(indices.shape[0]):
        fill_uniform(own, _IMAGE, indices[n], np.uint64(0), numbers)
        k = int(numbers[0] * figures.shape[0])
        _draw_ink(figures[k], law, numbers[16:], first)
        with_second = two and numbers[1] < 0.7
        if with_second:  # a part that moves on its own
            fill_uniform(other, _IMAGE, indices[n], np.uint64(0), again)
            _draw_ink(figures[int(again[0] * figures.shape[0])], law, again[16:], second)
        # What an image's ink is: in grey, bright by the family with a brightness of its own on most.
        bright = 1.0
        if law[_DIM] < 0.7:
            bright -= numbers[2] * (0.2 + 0.7 * law[_DIMMEST])
        for c in range(channels):
            for f in range(2):
                base = 1.0
                if channels == 3:
                    base = law[_COLOURS + 3 * (1 + (k + f) % 4) + c] + jitter * _spread(numbers[3 + c])
                elif f == 1:
                    base = 0.35 + 0.65 * law[_COLOURS + 3 + f]
                ink[f, c] = min(1.0, max(0.0, base)) * bright
            level = 0.0
            if law[_GROUND] > 0.55:
                level = law[_COLOURS + c] if channels == 3 else 0.8 * law[_GROUND_LEVEL]
                level += jitter * _spread(numbers[6 + c if channels == 3 else 6])
            if law[_GROUND] > 0.75 and law[_GROUND] < 0.85:  # another ground for each image
                level = numbers[9 + c if channels == 3 else 9]
            ground[c] = min(1.0, max(0.0, level))
        if channels == 3:  # most things are paler than random colours: towards the mean of the channels
            for colour in (ground, ink[0], ink[1]):
                mean = (colour[0] + colour[1] + colour[2]) / 3.0
                colour[:] = mean + law[_SATURATION] * (colour - mean)
        textured_ground = law[_GROUND] > _TEXTURED_GROUND
        strength = 0.0
        if law[_TEXTURED] >= _UNTEXTURED and numbers[12] < law[_TEXTURED]:
            strength = 0.6 * law[_TEXTURE]
        gloss = 0.5 * _spread(numbers[13]) * law[_GLOSS] if law[_PLAIN] < 0.4 else 0.0
        shade = (1.0 + gloss * ((np.arange(size) + 0.5) / size - 0.5)).reshape(size, 1)  # light from above or below
        for c in range(channels):
            grain = textures[n, c] / 255.0
            value = np.full((size, size), ground[c])
            if textured_ground:
                value += 0.7 * (grain - 0.5) if law[_GROUND] < 0.93 else grain - value
            value += first * (ink[0, c] * shade * (1.0 - strength * grain) - value)
            if with_second:  # over the first
                value += second * (ink[1, c] * shade - value)
            value = np.minimum(1.0, np.maximum(0.0, value))
            if law[_INVERT] < 0.25 and channels == 1:
                value = 1.0 - value
            out[n, c] = np.floor(255.0 * value + 0.5)
