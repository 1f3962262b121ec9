"""Scenes: families as a camera would see them, objects before other objects with a fine texture on all of them.

Families have flat ground, so a network that is trained on them alone takes the texture of photographs for noise and
removes it.  Scene f is family f as it is, or behind it lie dead leaves, or leaves alone are there; and what is not
left as it is gets duller colours, a little blur, texture with a 1/f spectrum, light from one side and an exposure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_integer, param
from dpsyngen.programs.drawing import Floats, Images, Word, Words
from dpsyngen.programs.drawing.counter_rng import fill_normal, fill_uniform, words
from dpsyngen.programs.drawing.portable import compiled, cos_sin, exp2
from dpsyngen.programs.registry import make_program, register
from dpsyngen.programs.tasks import Family
from dpsyngen.programs.wrappers import blur

_LAW = np.uint64(0x7363656E)  # "scen"
_IMAGE = np.uint64(0x73636D61)  # "scma"

# Numbers of a scene, uniform in (0, 1), by place.
(_KIND, _SMALLEST, _LEAF_COLOURS, _BLURRED, _BLUR, _SATURATION, _CONTRAST, _STRENGTH) = range(8)
(_SLOPE, _COLOURED, _UNEVEN, _LIGHT, _EXPOSURE) = range(8, 13)
_NUMBERS = 13
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
        seed, _ = words(np.uint64(self.seed), _LAW, np.uint64(self.number), np.uint64(0))
        law = np.empty(_NUMBERS)
        fill_uniform(np.uint64(seed), _LAW, np.uint64(0), np.uint64(1), law)
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
        colour = ("rotation" if law[_COLOURED] < 0.5 else "grey") if coloured else None
        texture = make_program("spectrum", slope=(max(slope - 0.3, 0.0), slope + 0.3), colour=colour, **given)
        _photograph(indices, np.uint64(seed), law, texture.batch(indices), out)


@compiled
def _photograph(indices: Words, seed: Word, law: Floats, textures: Images, out: Images) -> None:
    """Change images [N, C, S, S] in place; ``textures[n]`` is for image n."""
    channels, size = out.shape[1], out.shape[2]
    z = np.empty(2)
    u = np.empty(2)
    saturation = law[_SATURATION]
    contrast = 0.3 + 0.7 * law[_CONTRAST]
    deviation = 0.8 * law[_BLUR] if law[_BLURRED] < 0.4 else 0.0
    # A range of levels, of which about a sixth is a standard deviation: 0.006 to 0.13 of the whole range.
    strength = 6.0 * exp2(-7.3 + 4.3 * law[_STRENGTH])
    light = 0.8 * law[_LIGHT] * law[_LIGHT]
    for n in range(indices.shape[0]):
        used = fill_normal(seed, _IMAGE, indices[n], np.uint64(0), z)
        fill_uniform(seed, _IMAGE, indices[n], used, u)
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
