"""Images whose wavelet coefficients are independent and heavy-tailed, as those of natural images are one at a time.

Source: the wavelet-marginal model of Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963: in each
band coefficients have density ∝ exp(−|x/s|^r) with r about 0.4 to 0.8.  They impose it on noise through a steerable
pyramid, in ten rounds of analysis and synthesis (Heeger and Bergen, 1995), which reaches the law approximately.
Ours draws the coefficients of an *orthonormal* wavelet basis (Daubechies, 4 vanishing moments, periodic) and inverts it
once: the law holds exactly, at a hundredth of the cost, and at any size.  The price is that edges prefer the axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_range, colour_param, param
from dpsyngen.programs.drawing import Floats, Images, Ints, Law, Word, Words
from dpsyngen.programs.drawing.counter_rng import ONE, below, unit32, words32
from dpsyngen.programs.drawing.fields import COLOURED, COLOURS, ROTATION, paint_fields, power_of_two
from dpsyngen.programs.drawing.portable import LN2, compiled, exp2, log2, log2_gamma, normal_pair, power
from dpsyngen.programs.registry import register

COARSEST = 4  # side of the low-pass residual
# Daubechies, "Orthonormal bases of compactly supported wavelets", 1988: N = 4.
LOW_PASS = (
    0.23037781330885523,
    0.7148465705525415,
    0.6308807679295904,
    -0.02798376941698385,
    -0.18703481171888114,
    0.030841381835986965,
    0.032883011666982945,
    -0.010597401784997278,
)

_LAW = np.uint64(0x776D6C61)  # "wmla"
_COEFFICIENTS = np.uint64(0x776D636F)  # "wmco"
_LOW = np.array(LOW_PASS)


@register("wavelet-marginal")
@dataclass(frozen=True, kw_only=True)
class WaveletMarginal(Program):
    """Images from independent wavelet coefficients with density ∝ exp(−|x/s|^r) in each band; see the module.

    A band at level j (1 the finest) has the standard deviation 2^(decay·j), so decay = 1 gives the 1/f amplitudes of
    natural images.  The residual of 4 × 4 coefficients is normal with that of the last level.  Drawn on the next power
    of two (8 at least), shifted around by a random offset and cut.

    Attributes:
        tails: range of r, uniform in each band; 0.2 to 4, where 2 is the normal distribution.
        decay: range of the decay, uniform; 0 to 4.
        colour: as in "spectrum": "grey", "rotation" or "palette".
    """

    prior_tier: ClassVar[int] = 0

    tails: Any = param((0.4, 0.8), as_range, 0.2, 4.0)
    decay: Any = param((1.2, 2.2), as_range, 0.0, 4.0)
    colour: str = colour_param(COLOURS, COLOURED)

    @property
    def _side(self) -> int:
        return max(8, power_of_two(self.resolution))

    def _draw(self, indices: Words, out: Images) -> None:
        law = self.tails, self.decay, self._side
        draw(indices, np.uint64(self.seed), law, COLOURS.index(self.colour), out)


@compiled
def law_of(seed: Word, index: Word, law: Law, tails: Floats, offset: Ints) -> float:
    """Fill the tails [levels, 3] and the offset [2] of an image; returns its decay."""
    (tail_low, tail_high), (decay_low, decay_high), side = law
    a, b, c, _ = words32(seed, _LAW, index, np.uint64(0))
    offset[0] = below(b, side)
    offset[1] = below(c, side)
    for level in range(tails.shape[0]):
        four = words32(seed, _LAW, index, np.uint64(level + 1))
        for k in range(3):
            tails[level, k] = tail_low + unit32(four[k]) * (tail_high - tail_low)
    return decay_low + unit32(a) * (decay_high - decay_low)


@compiled
def fill_heavy_tailed(seed: Word, index: Word, block: Word, r: float, deviation: float, out: Floats) -> Word:
    """Fill `out`, [m, m], with draws of density ∝ exp(−|x/s|^r) and given standard deviation; returns the next block.

    |x/s|^r has a gamma distribution of shape 1/r, drawn by the method of Marsaglia and Tsang (2000).
    """
    shape = 1.0 / r
    # The variance of the law is s²·Γ(3/r)/Γ(1/r).
    scale = deviation * exp2(0.5 * (log2_gamma(shape) - log2_gamma(3.0 * shape)))
    # Marsaglia and Tsang: d·v has the law of shape d + ⅓, if v = (1 + cx)³ of a normal x is accepted as below.
    boost = shape < 1.0  # the method needs a shape of 1 at least: gamma(a) = gamma(a + 1)·U^(1/a)
    d = (shape + 1.0 if boost else shape) - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            while True:
                w0, w1, w2, w3 = words32(seed, _COEFFICIENTS, index, block)
                block = block + ONE
                x, _ = normal_pair(unit32(w0), unit32(w1))
                v = 1.0 + c * x
                if v <= 0.0:
                    continue
                v = v * v * v
                if LN2 * log2(unit32(w2)) < 0.5 * x * x + d - d * v + d * LN2 * log2(v):
                    break
            value = d * v
            if boost:
                value *= power(unit32(w3 >> np.uint64(1) << np.uint64(1)), 1.0 / shape)
            value = scale * power(value, 1.0 / r)
            out[i, j] = value if w3 & ONE else -value  # the bit that the boost does not use
    return block


@compiled
def merge_rows(low: Floats, high: Floats) -> Floats:
    """Invert one level of the transform along columns: low, high [m, k] to [2m, k], periodic."""
    m = low.shape[0]
    out = np.zeros((2 * m, low.shape[1]))
    for k in range(m):
        for t in range(8):
            row = (2 * k + t) % (2 * m)
            a = _LOW[t]  # low pass; the high pass is its mirror image with alternating signs
            b = _LOW[7 - t] if t % 2 == 0 else -_LOW[7 - t]
            for j in range(low.shape[1]):
                out[row, j] += a * low[k, j] + b * high[k, j]
    return out


@compiled
def draw_field(seed: Word, index: Word, block: Word, decay: float, tails: Floats, offset: Ints, field: Floats) -> Word:
    """Draw one field, [n, n], from bands with the given tails, shifted by `offset`; returns the next block."""
    levels = tails.shape[0]
    side = COARSEST
    # From the coarsest: each level doubles the side, joining four bands along columns and then along rows.
    low = np.empty((side, side))
    block = fill_heavy_tailed(seed, index, block, 2.0, exp2(decay * levels), low)
    for level in range(levels, 0, -1):
        deviation = exp2(decay * level)
        bands = np.empty((3, side, side))  # details across, down and in both directions
        for k in range(3):
            block = fill_heavy_tailed(seed, index, block, tails[level - 1, k], deviation, bands[k])
        left = merge_rows(low, bands[0])
        right = merge_rows(bands[1], bands[2])
        whole = merge_rows(np.ascontiguousarray(left.T), np.ascontiguousarray(right.T))
        low = np.ascontiguousarray(whole.T)
        side *= 2
    for i in range(side):
        for j in range(side):
            field[(i + offset[0]) % side, (j + offset[1]) % side] = low[i, j]
    return block


@compiled
def draw(indices: Words, seed: Word, law: Law, colour: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    side = law[2]
    levels = 0
    while COARSEST << levels < side:
        levels += 1
    tails = np.empty((levels, 3))
    offset = np.empty(2, dtype=np.int64)
    fields = np.empty((3, side, side))
    for n in range(indices.shape[0]):
        decay = law_of(seed, indices[n], law, tails, offset)
        block = np.uint64(0)
        for k in range(3 if colour == ROTATION else 1):
            block = draw_field(seed, indices[n], block, decay, tails, offset, fields[k])
        paint_fields(seed, indices[n], fields, colour, out[n])
