"""From random fields to colours."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs.checks import as_choice
from dpsyngen.programs.drawing.colours import MIX_COLOURS, MIX_VALUES, colour_mix, mix_channels
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import fill_uniform
from dpsyngen.programs.drawing.raster import stretch

COLOURS = ("grey", "rotation", "palette")
ROTATION = 1

_MIX = np.uint64(0x636D6978)  # "cmix"
_ZERO = np.uint64(0)


def field_colour(colour: str | None, channels: int) -> str:
    """The colour law of a random field, checked."""
    if colour is None:
        return "grey" if channels == 1 else "rotation"
    as_choice("colour", colour, COLOURS, "a colour law")
    if colour != "grey" and channels == 1:
        raise ConfigError(f"colour={colour!r} needs 3 channels, and channels=1 was given: choose channels=3, or grey.")
    return colour


@compiled
def paint_fields(
    seed: np.uint64, index: np.uint64, fields: NDArray[np.float64], law: int, out: NDArray[np.uint8]
) -> None:
    """Write the top left corner of one field, or of three for `ROTATION`, to `out`, uint8 [C, S, S].

    `fields` is float64 [3 or more, H, W], and is used up.
    """
    if law == 0:
        stretch(fields, out[:1])
        for c in range(1, out.shape[0]):
            out[c] = out[0]
        return
    u = np.empty(MIX_VALUES)
    colours = np.empty((MIX_COLOURS, 3))
    weights = np.empty(MIX_COLOURS)
    root = np.empty((3, 3))
    fill_uniform(seed, _MIX, index, _ZERO, u)
    count = colour_mix(u, colours, weights, root)
    if law == ROTATION:
        mix_channels(fields[:3], root)
        stretch(fields, out)
    else:
        cut_into_colours(fields[0], colours, weights, count, out)


@compiled
def cut_into_colours(
    field: NDArray[np.float64],
    colours: NDArray[np.float64],
    weights: NDArray[np.float64],
    count: int,
    out: NDArray[np.uint8],
) -> None:
    """Colour the pixels by rank: the lowest share weights[0] gets the first colour, and so on; shares are exact."""
    size = out.shape[1]
    values = np.empty(size * size)
    for i in range(size):
        for j in range(size):
            values[i * size + j] = field[i, j]
    order = np.argsort(values)
    colour = 0
    reached = weights[0]
    for rank in range(size * size):
        while colour < count - 1 and rank + 0.5 > reached * size * size:
            colour += 1
            reached += weights[colour]
        place = order[rank]
        for c in range(3):
            out[c, place // size, place % size] = np.uint8(min(255.0, math.floor(256.0 * colours[colour, c])))
