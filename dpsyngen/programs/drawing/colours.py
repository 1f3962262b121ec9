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
def uniform_colour(a: float, b: float, c: float, grey: bool, out: Floats) -> None:
    """Turn three uniforms in [0, 1) into levels 0 to 255; one level for all channels if `grey`."""
    out[0] = math.floor(256.0 * a)
    out[1] = out[0] if grey else math.floor(256.0 * b)
    out[2] = out[0] if grey else math.floor(256.0 * c)


@compiled
def colour_mix(u: Floats, colours: Floats, weights: Floats, root: Floats) -> int:
    """Draw a random palette with weights, and the matrix that makes white noise vary like it.

    3 to 22 colours, uniform in the RGB cube, with weights ∝ 0.001 + U (Baradad et al., arXiv 2106.05963).  No colour
    was measured on photographs.

    Args:
        u: `MIX_VALUES` uniforms.
        colours, weights: receive the palette, float64 [22, 3] in [0, 1] and [22].
        root: receives the lower triangular R, float64 [3, 3], with R·Rᵀ the covariance of the weighted palette.

    Returns:
        How many colours there are.
    """
    # The palette and its weights, its mean, its covariance, and the Cholesky root of that.
    count = 3 + min(MIX_COLOURS - 3, math.floor(u[0] * (MIX_COLOURS - 2)))
    total = 0.0
    for k in range(count):
        weights[k] = 0.001 + u[1 + 4 * k]
        total += weights[k]
        colours[k] = u[2 + 4 * k : 5 + 4 * k]
    mean = np.zeros(3)
    for k in range(count):
        weights[k] /= total
        for c in range(3):
            mean[c] += weights[k] * colours[k, c]
    covariance = np.zeros((3, 3))
    for k in range(count):
        for i in range(3):
            for j in range(3):
                covariance[i, j] += weights[k] * (colours[k, i] - mean[i]) * (colours[k, j] - mean[j])
    root[:] = 0.0
    for i in range(3):  # Cholesky: R·Rᵀ = covariance, row by row
        for j in range(i + 1):
            left = covariance[i, j]
            for k in range(j):
                left -= root[i, k] * root[j, k]
            if i == j:
                root[i, i] = math.sqrt(max(left, 1e-12))  # two colours on a line leave rounding
            else:
                root[i, j] = left / root[j, j]
    return count


@compiled
def mix_channels(fields: Floats, root: Floats) -> None:
    """Replace three fields, [3, H, W], by their linear combinations R·field at each pixel."""
    for i in range(fields.shape[1]):
        for j in range(fields.shape[2]):
            a = fields[0, i, j]
            b = fields[1, i, j]
            c = fields[2, i, j]
            fields[0, i, j] = root[0, 0] * a
            fields[1, i, j] = root[1, 0] * a + root[1, 1] * b
            fields[2, i, j] = root[2, 0] * a + root[2, 1] * b + root[2, 2] * c


@compiled
def ground_colour(seed: Word, index: Word, ground: int, grey: bool, out: Floats) -> None:
    """Draw the ground of image `index`, levels 0 to 255, [3]; "random" is uniform."""
    a, b, c, _ = words32(seed, _GROUND, index, np.uint64(0))
    uniform_colour(unit32(a), unit32(b), unit32(c), grey, out)
    if ground != RANDOM:
        out[:] = 255.0 * ground


@compiled
def ink_colour(seed: Word, index: Word, number: int, grey: bool, behind: Floats, out: Floats) -> None:
    """Draw ink `number` (0, 1, …) of image `index`, uniform among the colours that stand out from the ground.

    At least one channel differs from `behind` by 64 levels or more.  By rejection; half of all colours or more qualify.
    """
    block = np.uint64(number * 64 + 1)
    for _ in range(63):
        a, b, c, _ = words32(seed, _GROUND, index, block)
        block = block + np.uint64(1)
        uniform_colour(unit32(a), unit32(b), unit32(c), grey, out)
        difference = max(abs(out[0] - behind[0]), max(abs(out[1] - behind[1]), abs(out[2] - behind[2])))
        if difference >= _LEAST_CONTRAST:
            return
