"""Random numbers as a pure function of (seed, stream, index, block): Philox4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (the Random123
paper).  Exact integer arithmetic, so the numbers are the same on every machine.  Never for the privacy
mechanism: its seed here is public, and Philox is not cryptographic.

How its 128-bit counter and 64-bit key are used here::

    key     = seed                       (64 bits)
    counter = block | stream | index     (32, 32 and 64 bits)

`index` is the image, `block` counts within the image, and `stream` is a constant of what asks (four letters of its name
as a number), so that families with one seed stay independent.  No state is carried from image to image: that is why
image i is the same in any order and by any number of threads.  A block yields two 64-bit words, or four of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dpsyngen.programs.drawing import Floats, Word
from dpsyngen.programs.drawing.portable import compiled, normal_pair

# Everything is uint64: numba, like numpy, turns uint64 with a signed integer into a float.
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)  # this and the next: of Random123, chosen for their avalanche
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)  # golden ratio
_WEYL_1 = np.uint64(0xBB67AE85)  # √3 − 1
ONE = np.uint64(1)


@compiled
def philox4x32(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    """Apply ten rounds of Philox4x32 to counter (c0, c1, c2, c3) with key (k0, k1).

    All six arguments and the four results are uint64 that hold 32-bit values.
    """
    for _ in range(10):
        # A round: multiply two of the words, and mix high halves, neighbours and key; then step the key.
        product_0 = _MULTIPLIER_0 * c0  # 32 × 32 bits: cannot overflow
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> _32) ^ c1 ^ k0
        c1 = product_1 & _LOW
        c2 = (product_0 >> _32) ^ c3 ^ k1
        c3 = product_0 & _LOW
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@compiled
def words(seed: Word, stream: Word, index: Word, block: Word) -> tuple[Word, Word]:
    """Draw two uniform 64-bit words; `stream` and `block` are below 2³²."""
    a, b, c, d = philox4x32(block, stream, index & _LOW, index >> _32, seed & _LOW, seed >> _32)
    return a | (b << _32), c | (d << _32)


@compiled
def words32(seed: Word, stream: Word, index: Word, block: Word) -> tuple[Word, Word, Word, Word]:
    """Draw the same block as four uniform 32-bit words, each in a uint64."""
    return philox4x32(block, stream, index & _LOW, index >> _32, seed & _LOW, seed >> _32)


@compiled
def unit32(word: Word) -> float:
    """Map a 32-bit word to a double uniform on {½, 1½, …, 2³² − ½} / 2³², so inside (0, 1)."""
    return (float(word) + 0.5) * 2.0**-32


@compiled
def below(word: Word, count: int) -> int:
    """Map a 32-bit word to an integer from 0 to count − 1, even to 1 part in 2³²/count; `count` is below 2³²."""
    return np.int64((word * np.uint64(count)) >> _32)  # type: ignore[return-value]  # int() would stay unsigned in numba


@compiled
def pick(word: Word, shares: Floats) -> int:
    """Choose one of several by a 32-bit word; `shares` are their cumulative weights, ending in 1."""
    u = unit32(word)
    choice = 0
    while choice < shares.shape[0] - 1 and u >= shares[choice]:
        choice += 1
    return choice


def cumulative(weights: Sequence[float]) -> Floats:
    """Turn weights, not all 0, into shares for `pick`; a weight of 0 is never chosen, whatever the rounding."""
    shares = np.cumsum(weights) / np.sum(weights)
    shares[np.flatnonzero(weights)[-1] :] = 1.0
    return shares


@compiled
def fill_uniform(seed: Word, stream: Word, index: Word, block: Word, out: Floats) -> Word:
    """Fill the flat array `out` with uniforms in (0, 1), four to a block; returns the first block not used."""
    for n in range(0, out.shape[0], 4):
        four = words32(seed, stream, index, block)
        block = block + ONE
        for k in range(min(4, out.shape[0] - n)):
            out[n + k] = unit32(four[k])
    return block


@compiled
def fill_normal(seed: Word, stream: Word, index: Word, block: Word, out: Floats) -> Word:
    """Fill the flat array `out` with standard normals, four to a block; returns the first block not used."""
    for n in range(0, out.shape[0], 4):
        a, b, c, d = words32(seed, stream, index, block)
        block = block + ONE
        four = normal_pair(unit32(a), unit32(b)) + normal_pair(unit32(c), unit32(d))
        for k in range(min(4, out.shape[0] - n)):
            out[n + k] = four[k]
    return block


@compiled
def to_unit(word: Word) -> float:
    """Map the top 53 bits of a word to a double uniform on {0, 1, …, 2⁵³ − 1} / 2⁵³, so in [0, 1)."""
    return float(word >> np.uint64(11)) * 2.0**-53


@compiled
def unit_vector(seed: Word, stream: Word, index: Word, block: Word) -> tuple[float, float, Word]:
    """Draw a uniform direction (cos θ, sin θ); also returns the first block not used.

    By rejection from the square to the disc, which needs only √ and ÷ and is therefore exact everywhere; the
    libraries' cos and sin are not.  Uses 4/π blocks on average.
    """
    while True:
        word_x, word_y = words(seed, stream, index, block)
        block = block + ONE
        x = 2.0 * to_unit(word_x) - 1.0
        y = 2.0 * to_unit(word_y) - 1.0
        square = x * x + y * y
        if 0.0 < square <= 1.0:
            length = math.sqrt(square)
            return x / length, y / length, block
