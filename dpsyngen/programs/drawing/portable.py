"""Compiling inner loops so that they give the same bits on every machine, and the functions that this needs.

Compiled code here uses only what IEEE 754 fixes to the last bit: integers, + − × ÷ √, comparisons, rounding and exact
scaling by powers of two.  No fast-math, and none of the C library's sin, cos, exp2, log or pow: their last bits differ
between systems, which is enough to move an edge by a pixel once in a while and so to break "image i is the same
everywhere".  The series below are cut where the next term is below rounding; tests bound their error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import njit

LN2 = 0.6931471805599453
PER_LN2 = 1.4426950408889634
ROOT_HALF = 0.7071067811865476
_HALF_PI = 1.5707963267948966


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on its first call, releasing the interpreter lock so that threads help.

    The machine code is cached beside the source or, if that is read-only, in numba's user cache
    (``NUMBA_CACHE_DIR``); with no writable place it is compiled anew in each process.  The cache watches
    only the function's own file: after editing a helper that *another* file calls, delete
    ``__pycache__/*.nb*``.
    """
    try:
        return njit(function, cache=True, nogil=True, fastmath=False, error_model="numpy")
    except RuntimeError:  # "cannot cache function: no locator available"
        return njit(function, nogil=True, fastmath=False, error_model="numpy")


@compiled
def _four(x: float, a: float, b: float, c: float, d: float, rest: float) -> float:
    """Evaluate a polynomial by four steps of Horner's scheme: a + bx + cx² + dx³ + rest·x⁴."""
    return a + x * (b + x * (c + x * (d + x * rest)))


@compiled
def cos_sin(turns: float) -> tuple[float, float]:
    """Return (cos 2πt, sin 2πt) of t = `turns`, |t| below 2³⁰; absolute error below 3·10⁻¹⁶ for t in [0, 1]."""
    # Reduce to |a| ≤ π/4.  In turns this is exact; in radians it would need many digits of π.
    quarter = math.floor(4.0 * turns + 0.5)
    a = (4.0 * turns - quarter) * _HALF_PI
    s = a * a
    # Taylor: aᵏ/k!, odd k for the sine, even k for the cosine.
    tail = 1 / 362880 + s * (-1 / 39916800 + s * (1 / 6227020800 - s * (1 / 1307674368000)))
    sin = a * _four(s, 1.0, -1 / 6, 1 / 120, -1 / 5040, tail)
    tail = _four(s, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200, 1 / 20922789888000)
    cos = _four(s, 1.0, -0.5, 1 / 24, -1 / 720, tail)
    turn = int(quarter) & 3
    if turn == 0:
        return cos, sin
    if turn == 1:
        return -sin, cos
    if turn == 2:
        return -cos, -sin
    return sin, -cos


@compiled
def exp2(x: float) -> float:
    """Return 2ˣ; 0 below −1070, ∞ from 1024 on."""
    if x < -1070.0:
        return 0.0
    if x >= 1024.0:
        return math.inf
    whole = math.floor(x + 0.5)
    f = (x - whole) * LN2  # |f| ≤ 0.35, and 2ˣ = 2^whole · e^f
    tail = 1 / 40320 + f * (1 / 362880 + f * (1 / 3628800 + f * (1 / 39916800 + f / 479001600)))
    return math.ldexp(_four(f, 1.0, 1.0, 1 / 2, 1 / 6, _four(f, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, tail)), int(whole))


@compiled
def log2(x: float) -> float:
    """Return the binary logarithm of x > 0; −∞ at 0."""
    if x <= 0.0:
        return -math.inf
    mantissa, exponent = math.frexp(x)
    if mantissa < ROOT_HALF:
        mantissa *= 2.0
        exponent -= 1
    # ln m = 2·artanh z = 2(z + z³/3 + z⁵/5 + …) with z = (m − 1)/(m + 1), |z| ≤ 0.172
    z = (mantissa - 1.0) / (mantissa + 1.0)
    s = z * z
    tail = _four(s, 1 / 9, 1 / 11, 1 / 13, 1 / 15, 1 / 17 + s * (1 / 19 + s / 21))
    series = _four(s, 1.0, 1 / 3, 1 / 5, 1 / 7, tail)
    return exponent + 2.0 * z * series * PER_LN2


@compiled
def power(x: float, y: float) -> float:
    """Return xʸ for x ≥ 0; 1 for y = 0."""
    if y == 0.0:
        return 1.0
    if x <= 0.0:
        return 0.0 if y > 0.0 else math.inf
    return exp2(y * log2(x))


@compiled
def normal_pair(u: float, v: float) -> tuple[float, float]:
    """Turn u and v, uniform in [0, 1), into two independent standard normals (Box and Muller, 1958)."""
    length = math.sqrt(-2.0 * LN2 * log2(1.0 - u))
    cos, sin = cos_sin(v)
    return length * cos, length * sin


@compiled
def log2_gamma(x: float) -> float:
    """Return the binary logarithm of Γ(x), x > 0; relative error of Γ below 10⁻¹² (Stirling's series beyond 10)."""
    shift = 1.0
    while x < 10.0:
        shift *= x
        x += 1.0
    s = 1.0 / (x * x)
    series = (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s * (1 / 1680 - s / 1188)))) / x
    return (x - 0.5) * log2(x) + (0.9189385332046727 - x + series) * PER_LN2 - log2(shift)
