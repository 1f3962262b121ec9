"""The discrete Gaussian mechanism: nothing about it rests on floating point.

Each example's gradient is clipped and rounded towards zero to multiples of a grid
(:func:`dpsyngen.privacy.clipping.clip_to_grid`); from there on there are only integers.  The norm of what an example
contributes is checked exactly, sums are exact in any order, and the noise is *discrete* Gaussian, drawn by comparing
integers (Canonne, Kamath & Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020, arXiv 2004.00010;
CKS below).  Slower than the default, since every example's gradient is looked at in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.errors import ConfigError, require
from dpsyngen.privacy.clipping import ClippedGradient, GridGradient, default_grid
from dpsyngen.privacy.noise import GaussianMechanism
from dpsyngen.privacy.per_example import Loss, PerExampleGradients
from dpsyngen.privacy.randomness import Randomness

SMALLEST_SIGMA = 1 << 10
"""Least noise in grid units for training.  By Poisson summation the discrete and the continuous Gaussian of one σ have
normalising constants and divergences that agree to terms of the order exp(-2π²σ²), which is below 1e-8,000,000 here."""

_MOST_SIGMAS = 60  # candidates beyond it are turned down; exp(-59²/2) is less than 1e-750

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DiscreteGaussian(GaussianMechanism):
    """The discrete Gaussian mechanism on a sum of gradients that were clipped and rounded to a grid.

    Formal guarantee: on integer vectors with L2 sensitivity D, discrete Gaussian noise of parameter σ satisfies the
    same bounds on Rényi divergences as the continuous one, for every order (CKS, section 2); σ = ceil(z · D) here.  The
    accountant treats the Poisson-subsampled mechanism as its continuous counterpart, of which it is an approximation
    finer than exp(-2π²σ²) at σ >= 2^10, which is required.  Division and conversion to `dtype` are post-processing.

    Attributes:
        grid: a power of two; None: :func:`dpsyngen.privacy.clipping.default_grid`.
        dtype: of what is released.
    """

    grid: float | None = None
    dtype: torch.dtype = torch.float32

    def sum(
        self, engine: PerExampleGradients, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32
    ) -> GridGradient:
        grid = self.grid or default_grid(engine.clipping_norm, sum(p.numel() for p in engine.parameters))
        return engine.sum_on_grid(loss, examples, grid=grid, copies=copies, physical_batch=physical_batch)

    def release(self, total: ClippedGradient, randomness: Randomness, step: int) -> list[Tensor]:
        """(sum + noise) · grid / expected batch, one tensor a parameter, public; ConfigError if σ is below 2^10."""
        assert isinstance(total, GridGradient)
        sigma = math.ceil(self.noise_multiplier * total.l2_sensitivity)
        if sigma < SMALLEST_SIGMA:
            raise ConfigError(
                f"the noise would have a standard deviation of {sigma} steps of the grid, but must have at least "
                f"{SMALLEST_SIGMA}: choose a finer grid (see default_grid)."
            )
        sizes = [s.numel() for s in total.sums]
        noise = torch.from_numpy(discrete_gaussian(randomness, step, sum(sizes), sigma)).split(sizes)
        return [
            ((s + n.view(s.shape).to(s.device)).double() * (total.grid / self.expected_examples)).to(self.dtype)
            for s, n in zip(total.sums, noise, strict=True)
        ]


# --------------------------------------------------------------------------------- the discrete Gaussian, exactly


class _Words:
    """Uniform integers from the stream of one step."""

    def __init__(self, randomness: Randomness, step: int) -> None:
        self._randomness, self._step, self._part = randomness, step, count_from()

    def below(self, bounds: Ints) -> Ints:
        """One uniform integer in [0, bound) for each bound, by rejection."""
        m = bounds.astype(np.uint64)
        # Words at or above the largest multiple of the bound would favour small remainders: they are drawn again.
        top = np.uint64(2**64 - 1)
        limit = top - top % m
        out = self._randomness.words("noise", self._step, len(m), next(self._part)).copy()
        again = np.flatnonzero(out >= limit)
        while len(again):
            out[again] = self._randomness.words("noise", self._step, len(again), next(self._part))
            again = again[out[again] >= limit[again]]
        return (out % m).astype(np.int64)


_Fractions = list[tuple[Ints, Ints]]


def _bernoulli(words: _Words, fractions: _Fractions) -> NDArray[np.bool_]:
    """True with the probability that is the product of the fractions (numerator, denominator), each in [0, 1]."""
    out = np.ones(len(fractions[0][0]), dtype=bool)
    for numerator, denominator in fractions:
        still = np.flatnonzero(out)
        out[still] = words.below(denominator[still]) < numerator[still]
    return out


def _bernoulli_exp(words: _Words, fractions: _Fractions) -> NDArray[np.bool_]:
    """True with probability exp(-x), x the product of the fractions, in [0, 1] (CKS, algorithm 1)."""
    n = len(fractions[0][0])
    out = np.zeros(n, dtype=bool)
    active = np.arange(n)
    k = 1
    while len(active):
        # Draw Bernoulli(x/k) until one is false: the number of the draw is odd with probability exp(-x).
        one = np.ones(len(active), dtype=np.int64)
        go_on = _bernoulli(words, [*((a[active], b[active]) for a, b in fractions), (one, k * one)])
        out[active[~go_on]] = k % 2 == 1
        active = active[go_on]
        k += 1
    return out


def _all_of(words: _Words, times: Ints, fractions: _Fractions) -> NDArray[np.bool_]:
    """True with probability exp(-times * x): that many independent draws must all come out true."""
    out = np.ones(len(times), dtype=bool)
    active = np.flatnonzero(times > 0)
    done = 0
    while len(active):
        out[active] = _bernoulli_exp(words, [(a[active], b[active]) for a, b in fractions])
        done += 1
        active = active[out[active] & (times[active] > done)]
    return out


def discrete_gaussian(randomness: Randomness, step: int, count: int, sigma: int) -> Ints:
    """`count` integers, each n with probability proportional to exp(-n² / 2σ²), a function of (key, step, count, σ).

    Rejection from a discrete Laplace distribution of scale σ (CKS, algorithms 2 and 3), comparing integers only.
    """
    require(1 <= sigma <= 1 << 40, "sigma", sigma, "a whole number from 1 to 2^40")
    words = _Words(randomness, step)
    out = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while len(missing):
        n = len(missing)
        one = np.ones(n, dtype=np.int64)
        scale = sigma * one
        # 1. |Laplace| of scale σ = U + σ V: U uniform below σ, kept with probability exp(-U/σ).
        rest = words.below(scale)
        good = _bernoulli_exp(words, [(rest, scale)])
        # 2. V is geometric: it grows by one with probability exp(-1).
        whole = np.zeros(n, dtype=np.int64)
        growing = np.flatnonzero(good)
        while len(growing):
            growing = growing[_bernoulli_exp(words, [(one[growing], one[growing])])]
            whole[growing] += 1
            growing = growing[whole[growing] < _MOST_SIGMAS]
        # 3. A fair sign.
        value = rest + sigma * whole
        negative = words.below(2 * one) == 1
        good &= ~(negative & (value == 0))  # zero must not come twice
        # 4. The Gaussian, by rejection.  What is turned down is drawn again.
        _accept(words, good, value, scale)
        out[missing[good]] = np.where(negative, -value, value)[good]
        missing = missing[~good]
    return out


def _accept(words: _Words, good: NDArray[np.bool_], value: Ints, scale: Ints) -> None:
    """Keep what is `good` with probability exp(-(value - σ)² / 2σ²), a product of factors that can be drawn.

    With |value - σ| = qσ + r the exponent is r²/2σ² + q r/σ + (q mod 2)/2 + floor(q²/2).
    """
    q, r = np.divmod(np.abs(value - scale), scale)
    one = np.ones_like(q)
    i = np.flatnonzero(good)
    good[i] = _bernoulli_exp(words, [(one[i], 2 * one[i]), (r[i], scale[i]), (r[i], scale[i])])
    i = np.flatnonzero(good)
    good[i] = _all_of(words, q[i], [(r[i], scale[i])])
    i = np.flatnonzero(good)
    good[i] = _all_of(words, q[i] % 2, [(one[i], 2 * one[i])])
    i = np.flatnonzero(good)
    good[i] = _all_of(words, q[i] * q[i] // 2, [(one[i], one[i])])
