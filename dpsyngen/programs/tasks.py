"""Families and scenes: endless streams of programs, each with its own look, for networks that work on sets never seen.

Family f draws one to four random figures (closed contours or strokes) and varies them from image to image: smooth
warps, turns, shifts, brightness, texture, ground and ink.  Every sixth family is another program as it is.  A network
that is trained on many families cannot learn one of them by heart: it learns what all of them share.

Families have flat ground, so a network that is trained on them alone takes the texture of photographs for noise and
removes it.  Scene f is family f as it is, or behind it lie dead leaves, or leaves alone are there; and what is not
left as it is gets duller colours, a little blur, texture with a 1/f spectrum, light from one side and an exposure.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import MAX_RESOLUTION, Program, as_integer, param
from dpsyngen.programs.drawing import Floats, Images, Word, Words
from dpsyngen.programs.drawing.counter_rng import fill_normal, fill_uniform, words
from dpsyngen.programs.drawing.portable import compiled, cos_sin, exp2
from dpsyngen.programs.registry import make_program, register
from dpsyngen.programs.wrappers import blur

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


# ----------------------------------------------------------------------------------------------------- scenes

_SCENE = np.uint64(0x7363656E)  # "scen"
_SCENE_IMAGE = np.uint64(0x73636D61)  # "scma"

# Numbers of a scene, uniform in (0, 1), by place.
(_KIND, _SMALLEST, _LEAF_COLOURS, _BLURRED, _BLUR, _SCENE_SATURATION, _CONTRAST, _STRENGTH) = range(8)
(_SLOPE, _TEXTURE_COLOURED, _UNEVEN, _LIGHT, _EXPOSURE) = range(8, 13)
_SCENE_NUMBERS = 13
_AS_IT_IS, _LEAVES, _BEFORE_LEAVES = 0.4, 0.65, 0.82  # shares of the kinds, added up; the rest has the family's ground
_LEAF_SIZES = (0.03, 0.06, 0.1, 0.2)
_LEAF_LAWS = ("rgb", "palette", "grey")


@register("scene")
@dataclass(frozen=True, kw_only=True)
class Scene(Program):
    """One scene of an endless stream: image i is a pure function of (seed, number, i), as of any program.

    Attributes:
        number: of the scene, and of the `family` in it; 0 to 2⁶³ − 1.
    """

    prior_tier: ClassVar[int] = 1

    number: int = param(0, as_integer, 0, 2**63 - 1)

    def _draw(self, indices: Words, out: Images) -> None:
        seed, _ = words(np.uint64(self.seed), _SCENE, np.uint64(self.number), np.uint64(0))
        law = np.empty(_SCENE_NUMBERS)
        fill_uniform(np.uint64(seed), _SCENE, np.uint64(0), np.uint64(1), law)
        given = {"resolution": self.resolution, "channels": self.channels, "seed": int(seed)}
        coloured = self.channels == 3
        family = Family(resolution=self.resolution, channels=self.channels, seed=self.seed, number=self.number)
        ground = None
        if _AS_IT_IS <= law[_KIND] < _BEFORE_LEAVES:
            size = _LEAF_SIZES[int(law[_SMALLEST] * len(_LEAF_SIZES))]
            colour = _LEAF_LAWS[int(law[_LEAF_COLOURS] * len(_LEAF_LAWS))] if coloured else None
            leaves = make_program("dead-leaves", r_min=size, supersample=2, colour=colour, **given)
            ground = leaves.batch(indices)
        if ground is not None and law[_KIND] < _LEAVES:
            out[:] = ground
        else:
            family.draw(indices, ground, out)
        if law[_KIND] < _AS_IT_IS:
            return
        slope = 0.3 + 1.7 * float(law[_SLOPE])
        colour = ("rotation" if law[_TEXTURE_COLOURED] < 0.5 else "grey") if coloured else None
        texture = make_program("spectrum", slope=(max(slope - 0.3, 0.0), slope + 0.3), colour=colour, **given)
        _photograph(indices, np.uint64(seed), law, texture.batch(indices), out)


@compiled
def _photograph(indices: Words, seed: Word, law: Floats, textures: Images, out: Images) -> None:
    """Change images [N, C, S, S] in place; ``textures[n]`` is for image n."""
    channels, size = out.shape[1], out.shape[2]
    z = np.empty(2)
    u = np.empty(2)
    saturation = law[_SCENE_SATURATION]
    contrast = 0.3 + 0.7 * law[_CONTRAST]
    deviation = 0.8 * law[_BLUR] if law[_BLURRED] < 0.4 else 0.0
    # A range of levels, of which about a sixth is a standard deviation: 0.006 to 0.13 of the whole range.
    strength = 6.0 * exp2(-7.3 + 4.3 * law[_STRENGTH])
    light = 0.8 * law[_LIGHT] * law[_LIGHT]
    for n in range(indices.shape[0]):
        used = fill_normal(seed, _SCENE_IMAGE, indices[n], np.uint64(0), z)
        fill_uniform(seed, _SCENE_IMAGE, indices[n], used, u)
        if deviation > 0.0:
            blur(out[n], deviation, out[n])
        scale = strength * exp2(0.7 * z[0]) / 255.0
        exposure = 0.15 * law[_EXPOSURE] * z[1]
        cos, sin = cos_sin(u[0])
        slant = light * u[1] / size
        for i in range(size):
            for j in range(size):
                grey = 0.0
                for c in range(channels):
                    grey += float(out[n, c, i, j])
                grey /= 255.0 * channels
                rough = scale * (2.0 * grey if law[_UNEVEN] < 0.5 else 1.0)  # each thing has a roughness of its own
                lit = 1.0 + slant * (cos * (j + 0.5 - 0.5 * size) + sin * (i + 0.5 - 0.5 * size))
                for c in range(channels):
                    value = grey + saturation * (float(out[n, c, i, j]) / 255.0 - grey)
                    value = 0.5 + contrast * (value - 0.5)
                    value = lit * (value + rough * (float(textures[n, c, i, j]) - 127.5)) + exposure
                    out[n, c, i, j] = np.uint8(math.floor(255.0 * min(1.0, max(0.0, value)) + 0.5))
