"""Colours: laws of flat regions, random palettes, plain grounds and the inks on them.

A packed colour is an int: red | green << 8 | blue << 16, each 0 to 255.
"""

from __future__ import annotations

import math

import numpy as np

from dpsyngen.programs.drawing import Floats, Ints, Word
from dpsyngen.programs.drawing.counter_rng import below, unit32, words32
from dpsyngen.programs.drawing.portable import compiled

LAWS = ("grey", "rgb", "black-white", "palette")
GREY, RGB, BLACK_WHITE, PALETTE = range(4)
MAX_PALETTE = 8
MIX_COLOURS = 22
MIX_VALUES = 1 + 4 * MIX_COLOURS  # uniforms that `colour_mix` reads
GROUNDS = ("black", "white", "random")
RANDOM = 2

_PALETTE = np.uint64(0x70616C65)  # "pale"
_GROUND = np.uint64(0x67726F75)  # "grou"
_LEAST_CONTRAST = 64.0  # levels
_LOW_24 = np.uint64(0xFFFFFF)


@compiled
def colour_of(bits: Word, law: int, palette: Ints, count: int) -> int:
    """Draw a packed colour by the lowest 24 of random bits; `count` colours of `palette` are in use."""
    packed = int(bits & _LOW_24)
    if law == GREY:
        return (packed & 0xFF) * 0x010101
    if law == BLACK_WHITE:
        return (packed & 1) * 0xFFFFFF
    if law == PALETTE:
        return palette[(packed * count) >> 24]
    return packed


@compiled
def draw_palette(seed: Word, index: Word, grey: bool, palette: Ints) -> int:
    """Fill `palette` with the 2 to 8 colours of image `index`, evenly many and uniform; returns their number."""
    count = 0
    for k in range(MAX_PALETTE):
        a, b, _, _ = words32(seed, _PALETTE, index, np.uint64(k))
        if k == 0:
            count = 2 + below(b, MAX_PALETTE - 1)
        packed = int(a & _LOW_24)
        palette[k] = (packed & 0xFF) * 0x010101 if grey else packed
    return count


@compiled
def uniform_colour(seed: Word, stream: Word, index: Word, block: Word, grey: bool) -> Floats:
    """Draw three uniform levels 0 to 255, [3]; one level for all channels if `grey`."""
    a, b, c, _ = words32(seed, stream, index, block)
    return np.floor(256.0 * np.array([unit32(a), unit32(a if grey else b), unit32(a if grey else c)]))


@compiled
def colour_mix(u: Floats) -> tuple[Floats, Floats, Floats]:
    """Draw a random palette by `MIX_VALUES` uniforms, and the matrix that makes white noise vary like it.

    3 to 22 colours, uniform in the RGB cube, with weights ∝ 0.001 + U (Baradad et al., arXiv 2106.05963); no colour was
    measured on photographs.

    Returns:
        The colours [K, 3] in [0, 1], their weights [K], and the lower triangular R, [3, 3], with R·Rᵀ their covariance.
    """
    count = 3 + min(MIX_COLOURS - 3, math.floor(u[0] * (MIX_COLOURS - 2)))
    weights = 0.001 + u[1 : 1 + 4 * count : 4]
    colours = np.empty((count, 3))
    total = 0.0
    for k in range(count):
        total += weights[k]
        colours[k] = u[2 + 4 * k : 5 + 4 * k]
    weights /= total
    mean = np.zeros(3)
    for k in range(count):
        mean += weights[k] * colours[k]
    covariance = np.zeros((3, 3))
    for k in range(count):
        away = colours[k] - mean
        covariance += np.outer(weights[k] * away, away)
    root = np.zeros((3, 3))
    for i in range(3):  # Cholesky: R·Rᵀ = covariance, row by row
        for j in range(i + 1):
            left = covariance[i, j]
            for k in range(j):
                left -= root[i, k] * root[j, k]
            if i == j:
                root[i, i] = math.sqrt(max(left, 1e-12))  # two colours on a line leave rounding
            else:
                root[i, j] = left / root[j, j]
    return colours, weights, root


@compiled
def ground_colour(seed: Word, index: Word, ground: int, grey: bool) -> Floats:
    """Draw the ground of image `index`, levels 0 to 255, [3]; "random" is uniform."""
    if ground == RANDOM:
        return uniform_colour(seed, _GROUND, index, np.uint64(0), grey)
    return np.full(3, 255.0 * ground)


@compiled
def ink_colour(seed: Word, index: Word, number: int, grey: bool, behind: Floats) -> Floats:
    """Draw ink `number` (0, 1, …) of image `index`, uniform among the colours that stand out from the ground.

    At least one channel differs from `behind` by 64 levels or more.  By rejection; half of all colours or more qualify.
    """
    ink = behind
    for attempt in range(63):
        ink = uniform_colour(seed, _GROUND, index, np.uint64(64 * number + 1 + attempt), grey)
        if np.abs(ink - behind).max() >= _LEAST_CONTRAST:
            break
    return ink
