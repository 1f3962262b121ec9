"""A fast Fourier transform whose bits are the same on every machine, for sizes that are powers of two.

Cooley and Tukey's radix-2 algorithm down the columns, so that the inner loop runs along memory, then a transposition.
The libraries' transforms choose their order of operations by the processor they find.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.portable import cos_sin


def power_of_two(size: int) -> int:
    """The smallest power of two that is `size` or more."""
    return 1 << max(0, size - 1).bit_length()


@compiled
def roots(cos: NDArray[np.float64], sin: NDArray[np.float64]) -> None:
    """Fill both, of length n/2, with the first half of the n-th roots of unity."""
    n = 2 * cos.shape[0]
    for k in range(cos.shape[0]):
        cos[k], sin[k] = cos_sin(k / n)


@compiled
def _swap_rows(a: NDArray[np.float64], i: int, j: int) -> None:
    for k in range(a.shape[1]):
        a[i, k], a[j, k] = a[j, k], a[i, k]


@compiled
def _columns(
    re: NDArray[np.float64], im: NDArray[np.float64], cos: NDArray[np.float64], sin: NDArray[np.float64]
) -> None:
    n = re.shape[0]
    j = 0
    for i in range(1, n):  # bit-reversed order
        bit = n >> 1
        while j & bit:
            j ^= bit
            bit >>= 1
        j |= bit
        if i < j:
            _swap_rows(re, i, j)
            _swap_rows(im, i, j)
    half = 1
    while half < n:
        step = n // (2 * half)
        for start in range(0, n, 2 * half):
            for k in range(half):
                c = cos[k * step]
                s = sin[k * step]
                a_re = re[start + k]
                a_im = im[start + k]
                b_re = re[start + k + half]
                b_im = im[start + k + half]
                for m in range(n):
                    x = c * b_re[m] - s * b_im[m]
                    y = c * b_im[m] + s * b_re[m]
                    b_re[m] = a_re[m] - x
                    b_im[m] = a_im[m] - y
                    a_re[m] += x
                    a_im[m] += y
        half *= 2


@compiled
def _transpose(a: NDArray[np.float64]) -> None:
    for i in range(a.shape[0]):
        for j in range(i):
            a[i, j], a[j, i] = a[j, i], a[i, j]


@compiled
def inverse_2d(
    re: NDArray[np.float64], im: NDArray[np.float64], cos: NDArray[np.float64], sin: NDArray[np.float64]
) -> None:
    """Replace re + i·im, [n, n], by Σ_f (re + i·im)[f]·e^{2πi f·x/n}, unnormalised; `cos`, `sin` from `roots`.

    Swap the two arrays for the forward transform.
    """
    _columns(re, im, cos, sin)
    _transpose(re)
    _transpose(im)
    _columns(re, im, cos, sin)
    _transpose(re)
    _transpose(im)
