"""Plain grounds and the inks on them, for programs that draw figures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.drawing.colours import uniform_colour
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import unit32, words32

GROUNDS = ("black", "white", "random")
RANDOM = 2

_STREAM = np.uint64(0x67726F75)  # "grou"
_LEAST_CONTRAST = 64.0


@compiled
def ground_colour(seed: np.uint64, index: np.uint64, ground: int, grey: bool, out: NDArray[np.float64]) -> None:
    """The ground of image `index`, levels 0 to 255, [3]; "random" is uniform."""
    a, b, c, _ = words32(seed, _STREAM, index, np.uint64(0))
    uniform_colour(unit32(a), unit32(b), unit32(c), grey, out)
    if ground != RANDOM:
        out[:] = 255.0 * ground


@compiled
def ink_colour(
    seed: np.uint64, index: np.uint64, number: int, grey: bool, behind: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """Ink `number` (0, 1, …) of image `index`: uniform among the colours that stand out from the ground.

    At least one channel differs from `behind` by 64 levels or more.  By rejection; half of all colours or more qualify.
    """
    block = np.uint64(number * 64 + 1)
    for _ in range(63):
        a, b, c, _ = words32(seed, _STREAM, index, block)
        block = block + np.uint64(1)
        uniform_colour(unit32(a), unit32(b), unit32(c), grey, out)
        difference = max(abs(out[0] - behind[0]), max(abs(out[1] - behind[1]), abs(out[2] - behind[2])))
        if difference >= _LEAST_CONTRAST:
            return
