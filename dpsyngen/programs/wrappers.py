"""Programs made of programs: changed images of one (affine maps, blur, inversion, fewer levels, crops), or mixtures.

Image i of a wrapper is made from image i of its source, and has the prior tier of the source.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import MAX_RESOLUTION, Program, as_choice, as_counts, as_integer, as_number, as_range, param
from dpsyngen.programs.drawing import Floats, Images, Law, Word, Words
from dpsyngen.programs.drawing.counter_rng import below, cumulative, pick, unit32, words32
from dpsyngen.programs.drawing.portable import compiled, cos_sin, exp2, log2
from dpsyngen.programs.registry import inner_program, register

MAX_PROGRAMS = 64
BORDERS = ("reflect", "edge", "black")

_AFFINE = np.uint64(0x61666669)  # "affi"
_BLUR = np.uint64(0x626C7572)  # "blur"
_INVERT = np.uint64(0x696E7665)  # "inve"
_QUANTISE = np.uint64(0x7175616E)  # "quan"
_MIXTURE = np.uint64(0x6D697874)  # "mixt"
_CROP = np.uint64(0x63726F70)  # "crop"
_PER_LN2 = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Wrapper(Program):
    """A program that changes the images of another, its source.

    Attributes:
        source: the program whose images are changed: a name, or a mapping with name and parameters.
    """

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

    @abstractmethod
    def _changes(self, index: int) -> dict[str, Any]:
        """Return what is drawn at random to change image `index` of the source."""

    def _draw(self, indices: Words, out: Images) -> None:
        for n, image in enumerate(self.source.batch(indices)):
            self._change(image, int(indices[n]), out[n])

    def _params(self, index: int) -> dict[str, Any]:
        return {**self._changes(index), "source": self.source.params(index)}


@register("affine")
@dataclass(frozen=True, kw_only=True)
class Affine(Wrapper):
    """Images of a program, turned, scaled, sheared and shifted about the centre, with linear interpolation.

    `params` gives ``turn`` (degrees), ``scale``, ``shear``, ``shift`` (right, down, in resolutions) and ``source``.

    Attributes:
        turn: largest turn in degrees, uniform to both sides; 0 to 180.
        scale: range of the magnification, log-uniform; 0.1 to 10.
        shear: largest shear, uniform to both sides; 0 to 1.
        shift: largest shift as a fraction of the resolution, uniform to all sides; 0 to 1.
        border: what lies outside the source: "reflect" (its mirror image), "edge" (its border goes on) or "black".
    """

    turn: float = param(180.0, as_number, 0.0, 180.0)
    scale: Any = param((0.7, 1.4), as_range, 0.1, 10.0)
    shear: float = param(0.2, as_number, 0.0, 1.0)
    shift: float = param(0.1, as_number, 0.0, 1.0)
    border: str = param("reflect", as_choice, BORDERS, "a border")

    def _law_of(self, index: int) -> tuple[float, float, float, float, float]:
        law = self.turn / 360.0, self.scale, self.shear, self.shift
        drawn: tuple[float, float, float, float, float] = affine_law(np.uint64(self.seed), np.uint64(index), law)
        return drawn

    def _change(self, image: Images, index: int, out: Images) -> None:
        warp(image, *self._law_of(index), BORDERS.index(self.border), out)

    def _changes(self, index: int) -> dict[str, Any]:
        turns, scale, shear, right, down = self._law_of(index)
        return {"turn": 360.0 * turns, "scale": scale, "shear": shear, "shift": (right, down)}


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
def _at(image: Images, y: int, x: int, border: int) -> float:
    """Return a pixel, also outside the image."""
    size = image.shape[0]
    if border == 0:
        return float(image[_mirrored(y, size), _mirrored(x, size)])
    if border == 1:
        return float(image[min(size - 1, max(0, y)), min(size - 1, max(0, x))])
    return float(image[y, x]) if 0 <= y < size and 0 <= x < size else 0.0


@compiled
def warp(
    image: Images, turns: float, scale: float, slant: float, right: float, down: float, border: int, out: Images
) -> None:
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
            for c in range(out.shape[0]):  # mix the four pixels around it
                plane = image[c]
                upper = (1.0 - x) * _at(plane, p, q, border) + x * _at(plane, p, q + 1, border)
                lower = (1.0 - x) * _at(plane, p + 1, q, border) + x * _at(plane, p + 1, q + 1, border)
                out[c, i, j] = np.uint8(math.floor((1.0 - y) * upper + y * lower + 0.5))


@register("blur")
@dataclass(frozen=True, kw_only=True)
class Blur(Wrapper):
    """Images of a program, blurred by a Gaussian, with mirrored borders.

    `params` gives ``deviation`` in pixels and ``source``.

    Attributes:
        deviation: range of the Gaussian's standard deviation in pixels, uniform; 0 to 64.
    """

    deviation: Any = param((0.0, 2.0), as_range, 0.0, 64.0)

    def _change(self, image: Images, index: int, out: Images) -> None:
        blur(image, self._changes(index)["deviation"], out)

    def _changes(self, index: int) -> dict[str, Any]:
        return {"deviation": uniform_law(np.uint64(self.seed), _BLUR, np.uint64(index), *self.deviation)}


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
        weights[k] = exp2(-0.5 * _PER_LN2 * (k / deviation) * (k / deviation))
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
    """Images of a program, a share of them inverted (255 − v in place of level v).

    `params` gives ``inverted`` and ``source``.

    Attributes:
        probability: of inverting an image; 0 to 1.
    """

    probability: float = param(1.0, as_number, 0.0, 1.0)

    def _change(self, image: Images, index: int, out: Images) -> None:
        np.subtract(255, image, out=out) if self._changes(index)["inverted"] else np.copyto(out, image)

    def _changes(self, index: int) -> dict[str, Any]:
        drawn = uniform_law(np.uint64(self.seed), _INVERT, np.uint64(index), 0.0, 1.0)
        return {"inverted": bool(drawn < self.probability)}


@register("quantise")
@dataclass(frozen=True, kw_only=True)
class Quantise(Wrapper):
    """Images of a program in fewer levels: each value moves to the nearest of m, spread evenly from 0 to 255.

    `params` gives ``levels`` m and ``source``.

    Attributes:
        levels: range of m, 2 to 256, evenly.
    """

    levels: Any = param((2, 8), as_counts, 2, 256)

    def _change(self, image: Images, index: int, out: Images) -> None:
        steps = self._changes(index)["levels"] - 1
        nearest = (2 * np.arange(256) * steps + 255) // 510  # round(v·steps / 255)
        out[:] = ((2 * nearest * 255 + steps) // (2 * steps))[image]

    def _changes(self, index: int) -> dict[str, Any]:
        low, high = self.levels
        w, _, _, _ = words32(np.uint64(self.seed), _QUANTISE, np.uint64(index), np.uint64(0))
        return {"levels": low + int(below(w, high - low + 1))}


@register("crop")
@dataclass(frozen=True, kw_only=True)
class Crop(Wrapper):
    """Windows at random places in larger images.  `params` gives ``corner`` (down, right) in pixels and ``source``.

    Attributes:
        source_resolution: of the images that are cropped, from the resolution to 2048.  None: twice the resolution.
    """

    source_resolution: int | None = None

    def __post_init__(self) -> None:
        Program.__post_init__(self)
        if self.source_resolution is None:
            object.__setattr__(self, "source_resolution", min(MAX_RESOLUTION, 2 * self.resolution))
        size = as_integer("source_resolution", self.source_resolution, 1, MAX_RESOLUTION)
        if size < self.resolution:
            raise ConfigError(
                f"source_resolution={size} is smaller than resolution={self.resolution}: "
                "nothing can be cropped; give a larger one."
            )
        object.__setattr__(self, "source", inner_program(self, "source", self.source, resolution=size))

    def _draw(self, indices: Words, out: Images) -> None:
        for n, index in enumerate(indices):  # one by one, as the sources can be large
            self._change(self.source.batch([index])[0], int(index), out[n])

    def _change(self, image: Images, index: int, out: Images) -> None:
        i, j = self._changes(index)["corner"]
        out[:] = image[:, i : i + self.resolution, j : j + self.resolution]

    def _changes(self, index: int) -> dict[str, Any]:
        room = self.source.resolution - self.resolution + 1
        a, b, _, _ = words32(np.uint64(self.seed), _CROP, np.uint64(index), np.uint64(0))
        return {"corner": (int(below(a, room)), int(below(b, room)))}


@register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(Program):
    """Images of several programs, with weights: image i is image i of one of them, drawn at random.

    Inner programs share resolution and channels and get seeds of their own.  The prior tier is the largest of theirs.
    `params` gives ``program`` (its place in the list), ``name`` and the ``params`` of the inner program.

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

    def _params(self, index: int) -> dict[str, Any]:
        k = self._choices(np.array([index], dtype=np.uint64))[0]
        return {"program": k, "name": self.programs[k].name, "params": self.programs[k].params(index)}
