"""Colour laws of flat regions.

A colour is an int: red | green << 8 | blue << 16, each 0 to 255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import words32

LAWS = ("grey", "rgb", "black-white", "palette")
GREY, RGB, BLACK_WHITE, PALETTE = range(4)
MAX_PALETTE = 8

_STREAM = np.uint64(0x70616C65)  # "pale"
_LOW_24 = np.uint64(0xFFFFFF)


@compiled
def colour_of(bits: np.uint64, law: int, palette: NDArray[np.int64], count: int) -> int:
    """A colour from 24 random bits; `count` colours of `palette` are in use."""
    packed = int(bits)
    if law == GREY:
        return (packed & 0xFF) * 0x010101
    if law == BLACK_WHITE:
        return (packed & 1) * 0xFFFFFF
    if law == PALETTE:
        return palette[(packed * count) >> 24]
    return packed


@compiled
def draw_palette(seed: np.uint64, index: np.uint64, grey: bool, palette: NDArray[np.int64]) -> int:
    """Fill `palette` with the 2 to 8 colours of image `index`, evenly many and uniform; returns their number."""
    count = 0
    for k in range(MAX_PALETTE):
        a, b, _, _ = words32(seed, _STREAM, index, np.uint64(k))
        if k == 0:
            count = 2 + int((b * np.uint64(MAX_PALETTE - 1)) >> np.uint64(32))
        packed = int(a & _LOW_24)
        palette[k] = (packed & 0xFF) * 0x010101 if grey else packed
    return count
