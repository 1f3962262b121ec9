"""Sampling radii by inverting power laws in closed form."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.portable import exp2, log2, power


@compiled
def mass(exponent: float, low: float, high: float) -> float:
    """∫ r^−exponent from `low` to `high`, 0 < low ≤ high."""
    if abs(exponent - 1.0) < 1e-9:
        return log2(high / low) * 0.6931471805599453
    a = 1.0 - exponent
    return (power(high, a) - power(low, a)) / a


@compiled
def inverse(u: float, exponent: float, low: float, high: float) -> float:
    """The radius below which a share u of the density ∝ r^−exponent on [low, high] lies."""
    if exponent == 3.0:
        below, above = 1.0 / (low * low), 1.0 / (high * high)
        r = 1.0 / math.sqrt(below + u * (above - below))
    elif exponent == 2.0:
        below, above = 1.0 / low, 1.0 / high
        r = 1.0 / (below + u * (above - below))
    elif abs(exponent - 1.0) < 1e-9:
        r = low * exp2(u * log2(high / low))
    else:
        a = 1.0 - exponent
        below, above = power(low, a), power(high, a)
        r = power(below + u * (above - below), 1.0 / a)
    return min(high, max(low, r))


@compiled
def padded_masses(exponent: float, low: float, high: float, size: float, out: NDArray[np.float64]) -> float:
    """Split ∫ r^−exponent·(size + 2r)² dr on [low, high] into the three power laws of its expansion.

    ``out[k]`` becomes the mass of the law r^−(exponent − k), k = 0, 1, 2; returns their sum.
    """
    out[0] = size * size * mass(exponent, low, high)
    out[1] = 4.0 * size * mass(exponent - 1.0, low, high)
    out[2] = 4.0 * mass(exponent - 2.0, low, high)
    return out[0] + out[1] + out[2]


@compiled
def padded_radius(u: float, exponent: float, low: float, high: float, masses: NDArray[np.float64]) -> float:
    """Radius of a leaf whose centre is uniform in the canvas padded by the radius: density ∝ r^−exponent·(size + 2r)².

    A mixture of three power laws: u picks the law, and what is left of it the radius.  `masses` is what
    `padded_masses` wrote.
    """
    v = u * (masses[0] + masses[1] + masses[2])
    if v < masses[0]:
        return inverse(v / masses[0], exponent, low, high)
    v -= masses[0]
    if v < masses[1]:
        return inverse(v / masses[1], exponent - 1.0, low, high)
    v -= masses[1]
    return inverse(min(1.0, v / masses[2]), exponent - 2.0, low, high)
