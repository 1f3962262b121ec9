"""Programs made of programs: changed images of one (affine maps, blur, inversion), or mixtures.

Image i of a wrapper is made from image i of its source, and has the prior tier of the source.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program, as_number, as_range, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.counter_rng import cumulative, pick, unit32, words32
from dpsyngen.programs.drawing.portable import PER_LN2, compiled, cos_sin, exp2, log2
from dpsyngen.programs.registry import inner_program, register

MAX_PROGRAMS = 64

_AFFINE = np.uint64(0x61666669)  # "affi"
_BLUR = np.uint64(0x626C7572)  # "blur"
_INVERT = np.uint64(0x696E7665)  # "inve"
_MIXTURE = np.uint64(0x6D697874)  # "mixt"


@dataclass(frozen=True, kw_only=True)
class Wrapper(Program):
    """A program that changes the images of another, its source: a name, or a mapping with name and parameters."""

    source: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "source", inner_program(self, "source", self.source))

    @property
    def prior_tier(self) -> int:  # type: ignore[override]
        """The prior tier of the source."""
        return int(self.source.prior_tier)

    @abstractmethod
    def _change(self, image: Images, index: int, out: Images) -> None:
        """Write `image`, number `index` of the source, to `out` as it is changed; both [C, S, S]."""

    def _draw(self, indices: Words, out: Images) -> None:
        for n, image in enumerate(self.source.batch(indices)):
            self._change(image, int(indices[n]), out[n])


@register("affine")
@dataclass(frozen=True, kw_only=True)
class Affine(Wrapper):
    """Images of a program, its `source`, turned, scaled, sheared and shifted about the centre, linearly interpolated.

    Outside of an image lies its mirror image.

    Attributes:
        turn: largest turn in degrees, uniform to both sides; 0 to 180.
        scale: range of the magnification, log-uniform; 0.1 to 10.
        shear: largest shear, uniform to both sides; 0 to 1.
        shift: largest shift as a fraction of the resolution, uniform to all sides; 0 to 1.
    """

    turn: float = param(180.0, as_number, 0.0, 180.0)
    scale: Any = param((0.7, 1.4), as_range, 0.1, 10.0)
    shear: float = param(0.2, as_number, 0.0, 1.0)
    shift: float = param(0.1, as_number, 0.0, 1.0)

    def _law(self) -> Law:
        return self.turn / 360.0, self.scale, self.shear, self.shift

    def _change(self, image: Images, index: int, out: Images) -> None:
        warp(image, *affine_law(np.uint64(self.seed), np.uint64(index), self._law()), out)


@compiled
def affine_law(seed: Word, index: Word, law: Law) -> tuple[float, float, float, float, float]:
    """Draw turns, scale, shear and the two shifts of an image."""
    turn, (low, high), shear, shift = law
    a, b, c, d = words32(seed, _AFFINE, index, np.uint64(0))
    e, _, _, _ = words32(seed, _AFFINE, index, np.uint64(1))
    return (
        turn * (2.0 * unit32(a) - 1.0),
        low * exp2(unit32(b) * log2(high / low)),
        shear * (2.0 * unit32(c) - 1.0),
        shift * (2.0 * unit32(d) - 1.0),
        shift * (2.0 * unit32(e) - 1.0),
    )


@compiled
def _mirrored(place: int, size: int) -> int:
    """Return the row or column of an image that its mirror images have at `place`, which may lie outside."""
    if 0 <= place < size:  # the usual case, without the slow division
        return place
    place %= 2 * size
    return min(place, 2 * size - 1 - place)


@compiled
def warp(image: Images, turns: float, scale: float, slant: float, right: float, down: float, out: Images) -> None:
    """Shear, turn, scale and shift an image about its centre, both [C, S, S]."""
    size = out.shape[2]
    middle = 0.5 * size
    cos, sin = cos_sin(turns)
    for i in range(size):
        for j in range(size):
            # From a pixel of the result back to its place (x, y) in the source: shift, scale, turn, shear inverted.
            x = (j + 0.5 - middle - right * size) / scale
            y = (i + 0.5 - middle - down * size) / scale
            x, y = cos * x + sin * y, cos * y - sin * x
            x = x - slant * y + middle - 0.5
            y = y + middle - 0.5
            q = math.floor(x)
            p = math.floor(y)
            x -= q
            y -= p
            top, bottom = _mirrored(p, size), _mirrored(p + 1, size)
            left, far = _mirrored(q, size), _mirrored(q + 1, size)
            for c in range(out.shape[0]):  # mix the four pixels around it
                upper = (1.0 - x) * float(image[c, top, left]) + x * float(image[c, top, far])
                lower = (1.0 - x) * float(image[c, bottom, left]) + x * float(image[c, bottom, far])
                out[c, i, j] = np.uint8(math.floor((1.0 - y) * upper + y * lower + 0.5))


@register("blur")
@dataclass(frozen=True, kw_only=True)
class Blur(Wrapper):
    """Images of a program, its `source`, blurred by a Gaussian, with mirrored borders.

    Attributes:
        deviation: range of the Gaussian's standard deviation in pixels, uniform; 0 to 64.
    """

    deviation: Any = param((0.0, 2.0), as_range, 0.0, 64.0)

    def _change(self, image: Images, index: int, out: Images) -> None:
        blur(image, uniform_law(np.uint64(self.seed), _BLUR, np.uint64(index), *self.deviation), out)


@compiled
def uniform_law(seed: Word, stream: Word, index: Word, low: float, high: float) -> float:
    """Draw one number of an image, uniform from `low` to `high`."""
    a, _, _, _ = words32(seed, stream, index, np.uint64(0))
    return low + unit32(a) * (high - low)


@compiled
def blur_rows(image: Floats, weights: Floats, out: Floats) -> None:
    """Blur [S, S] along rows, and transpose it, so that a second call blurs along columns."""
    size = image.shape[0]
    total = weights[0]
    for k in range(1, weights.shape[0]):
        total += 2.0 * weights[k]
    for i in range(size):
        for j in range(size):
            value = weights[0] * image[i, j]
            for k in range(1, weights.shape[0]):
                value += weights[k] * (image[i, _mirrored(j - k, size)] + image[i, _mirrored(j + k, size)])
            out[j, i] = value / total


@compiled
def blur(image: Images, deviation: float, out: Images) -> None:
    """Blur an image [C, S, S] by a Gaussian of a deviation in pixels, cut off at 4 deviations."""
    size = out.shape[1]
    level, rows = np.empty((size, size)), np.empty((size, size))
    weights = np.ones(math.ceil(4.0 * deviation) + 1)
    for k in range(1, weights.shape[0]):
        weights[k] = exp2(-0.5 * PER_LN2 * (k / deviation) * (k / deviation))
    for c in range(out.shape[0]):  # the Gaussian is a product: along rows first, then along columns
        level[:] = image[c]
        blur_rows(level, weights, rows)
        blur_rows(rows, weights, level)
        for i in range(size):
            for j in range(size):
                out[c, i, j] = np.uint8(min(255.0, math.floor(level[i, j] + 0.5)))


@register("invert")
@dataclass(frozen=True, kw_only=True)
class Invert(Wrapper):
    """Images of a program, its `source`, a share of them inverted (255 − v in place of level v).

    Attributes:
        probability: of inverting an image; 0 to 1.
    """

    probability: float = param(1.0, as_number, 0.0, 1.0)

    def _change(self, image: Images, index: int, out: Images) -> None:
        drawn = uniform_law(np.uint64(self.seed), _INVERT, np.uint64(index), 0.0, 1.0)
        np.subtract(255, image, out=out) if drawn < self.probability else np.copyto(out, image)


@register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(Program):
    """Images of several programs, with weights: image i is image i of one of them, drawn at random.

    Inner programs share resolution and channels and get seeds of their own.  The prior tier is the largest of theirs.

    Attributes:
        programs: list of 1 to 64 programs, each a name or a mapping with name and parameters.
        weights: list of as many numbers, 0 or more, not all 0; None: evenly.
    """

    programs: Any
    weights: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.programs
        if not isinstance(given, list | tuple) or not 1 <= len(given) <= MAX_PROGRAMS:
            raise ConfigError(f"programs={given!r} is not a list of programs: give 1 to {MAX_PROGRAMS} of them.")
        inner = tuple(inner_program(self, f"programs[{k}]", value, position=k) for k, value in enumerate(given))
        object.__setattr__(self, "programs", inner)
        if self.weights is None:
            return
        if not isinstance(self.weights, list | tuple) or len(self.weights) != len(inner):
            raise ConfigError(f"weights={self.weights!r} does not fit {len(inner)} programs: give one number for each.")
        weights = tuple(as_number(f"weights[{k}]", w, 0.0, 1e9) for k, w in enumerate(self.weights))
        if sum(weights) <= 0.0:
            raise ConfigError("weights are all 0: give a positive one to at least one program.")
        object.__setattr__(self, "weights", weights)

    @property
    def prior_tier(self) -> int:  # type: ignore[override]
        """The largest prior tier of the inner programs."""
        return max(program.prior_tier for program in self.programs)

    def _choices(self, indices: Words) -> list[int]:
        """Draw which program makes each image."""
        shares = cumulative(self.weights or [1.0] * len(self.programs))
        drawn = (words32(np.uint64(self.seed), _MIXTURE, index, np.uint64(0)) for index in indices)
        return [pick(words[0], shares) for words in drawn]

    def _draw(self, indices: Words, out: Images) -> None:
        choices = np.array(self._choices(indices))
        for k in np.unique(choices):
            mine = choices == k
            out[mine] = self.programs[k].batch(indices[mine])
