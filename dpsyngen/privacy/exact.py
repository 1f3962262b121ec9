"""The Gaussian mechanism in whole numbers: nothing about it rests on floating point.

Each example's gradient is clipped and rounded towards zero to multiples of a grid; from there on there are only
integers: the norm of what an example contributes is checked exactly, sums are exact in any order, and the noise is
*discrete* Gaussian, drawn by comparing integers (Canonne, Kamath & Steinke, "The discrete Gaussian for differential
privacy", NeurIPS 2020, arXiv 2004.00010).  Slower than the default, since every example's gradient is looked at in
fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.clipping import clip
from dpsyngen.privacy.contributions import Dense
from dpsyngen.privacy.randomness import Randomness

SMALLEST_SIGMA = 1 << 10
"""Least noise in grid units for training.  By Poisson summation the discrete and the continuous Gaussian of one σ have
normalising constants and divergences that agree to terms of the order exp(-2π²σ²), which is below 1e-8,000,000 here."""

_LARGEST = 1 << 31  # of one example's norm in grid units: squares then fit into 64 bits
_MOST_SIGMAS = 60  # candidates beyond it are turned down; exp(-59²/2) is less than 1e-750

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GridGradient:
    """A sum of clipped gradients in multiples of a grid.

    Formal guarantee: adding or removing one example changes ``sums`` by a vector of integers whose L2 norm is at most
    ``l2_sensitivity``.  Both facts are statements about integers that were checked as such.

    Attributes:
        sums: int64, one tensor a parameter.
        grid: what 1 stands for; a power of two.
        l2_sensitivity: floor(C / grid), in grid units.
        examples: how many went in.  Private.
        norms: [examples], norms before clipping.  Private.
        not_finite: examples that contribute zero because their gradient was not finite.  Private.
    """

    sums: list[Tensor]
    grid: float
    l2_sensitivity: int
    examples: int
    norms: Tensor
    not_finite: int

    def __add__(self, other: GridGradient) -> GridGradient:
        """The sum over both sets of examples, which must be disjoint."""
        if (self.grid, self.l2_sensitivity) != (other.grid, other.l2_sensitivity):
            raise ValueError(f"grids {self.grid} and {other.grid} or their sensitivities differ: they cannot be added.")
        return GridGradient(
            [a + b for a, b in zip(self.sums, other.sums, strict=True)],
            self.grid,
            self.l2_sensitivity,
            self.examples + other.examples,
            torch.cat([self.norms, other.norms]),
            self.not_finite + other.not_finite,
        )


def default_grid(clipping_norm: float, parameters: int) -> float:
    """A power of two so fine that rounding towards zero takes at most a thousandth of C off a gradient (in L2).

    Args:
        clipping_norm: C > 0.
        parameters: how many numbers a gradient has.
    """
    return 2.0 ** math.floor(math.log2(1e-3 * clipping_norm / math.sqrt(parameters)))


def _sensitivity(clipping_norm: float, grid: float) -> int:
    if not grid > 0 or math.frexp(grid)[0] != 0.5:
        raise ConfigError(f"the grid is {grid}, but must be a power of two, so that multiples of it are exact.")
    bound = math.floor(clipping_norm / grid)
    if not 1 <= bound < _LARGEST:  # strictly, so that a number clamped to it is seen to be too large
        raise ConfigError(
            f"clipping norm {clipping_norm} is {clipping_norm / grid:.3g} steps of the grid {grid}, but must be "
            f"at least 1 and below {_LARGEST}: choose a {'finer' if bound < 1 else 'coarser'} grid (see default_grid)."
        )
    return bound


def empty_on_grid(parameters: list[Tensor], clipping_norm: float, grid: float) -> GridGradient:
    """The sum over no examples."""
    sums = [torch.zeros_like(p, dtype=torch.int64) for p in parameters]
    norms = torch.zeros(0, dtype=torch.float64)
    return GridGradient(sums, grid, _sensitivity(clipping_norm, grid), 0, norms, 0)


def clip_to_grid(gradients: list[Tensor], clipping_norm: float, grid: float) -> GridGradient:
    """Clip each example's gradient to `clipping_norm`, round it towards zero to the grid, and sum.

    Args:
        gradients: per-example tensors [B, ...]; examples with a NaN or an infinity contribute zero.
        clipping_norm: C > 0, fewer than 2^31 steps of the grid.
        grid: a power of two.

    Raises:
        ConfigError: the grid is no power of two, or too coarse or too fine.
    """
    bound = _sensitivity(clipping_norm, grid)
    total = empty_on_grid([g[0] for g in gradients], clipping_norm, grid)
    norms, bad = [], 0
    for b in range(len(gradients[0])):
        # Alone and in fp64: the clipped gradient is the clipped sum of one example.  To whole steps of the grid: a
        # gradient of few coordinates loses almost nothing to truncation, and would else exceed the bound.
        one = clip([Dense(g[b : b + 1].double()) for g in gradients], [0] * len(gradients), bound * grid, "flat")
        norms.append(one.norms.double().cpu())
        bad += one.not_finite
        # Dividing by a power of two is exact; truncation never makes a number larger.
        steps = [(s / grid).trunc().to(torch.int64) for s in one.sums]
        if _squared_norm(steps) <= bound * bound:
            for whole, part in zip(total.sums, steps, strict=True):
                whole += part
        else:  # rounding in fp64 went the wrong way by a hair; the bound is what counts
            bad += 1
    return GridGradient(total.sums, grid, bound, len(norms), torch.cat([total.norms, *norms]), bad)


def _squared_norm(steps: list[Tensor]) -> int:
    """Exactly: squares below 2^62 are added in two halves that cannot overflow."""
    total = 0
    for s in steps:
        squares = s.abs().clamp_max(_LARGEST).square()
        total += (int((squares >> 31).sum()) << 31) + int((squares & ((1 << 31) - 1)).sum())
    return total


# --------------------------------------------------------------------------------- the discrete Gaussian, exactly


class _Words:
    """Uniform integers from the stream of one step."""

    def __init__(self, randomness: Randomness, step: int) -> None:
        self._randomness, self._step, self._part = randomness, step, count_from()

    def below(self, bounds: Ints) -> Ints:
        """One uniform integer in [0, bound) for each bound, by rejection."""
        m = bounds.astype(np.uint64)
        top = np.uint64(2**64 - 1)
        limit = top - top % m  # a multiple of the bound
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
    """True with probability exp(-x), x the product of the fractions, in [0, 1] (CKS 2020, algorithm 1)."""
    n = len(fractions[0][0])
    out = np.zeros(n, dtype=bool)
    active = np.arange(n)
    k = 1
    while len(active):
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

    Rejection from a discrete Laplace distribution of scale σ (CKS 2020, algorithms 2 and 3); every decision compares
    integers.

    Args:
        randomness: the run's secret streams.
        step: number of the step.
        count: how many.
        sigma: σ, a whole number from 1 to 2^40.
    """
    if not 1 <= sigma <= 1 << 40:
        raise ValueError(f"sigma is {sigma}, but must be a whole number from 1 to 2^40.")
    words = _Words(randomness, step)
    out = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while len(missing):
        n = len(missing)
        one = np.ones(n, dtype=np.int64)
        scale = sigma * one
        rest = words.below(scale)
        good = _bernoulli_exp(words, [(rest, scale)])
        whole = np.zeros(n, dtype=np.int64)
        growing = np.flatnonzero(good)
        while len(growing):
            growing = growing[_bernoulli_exp(words, [(one[growing], one[growing])])]
            whole[growing] += 1
            growing = growing[whole[growing] < _MOST_SIGMAS]
        value = rest + sigma * whole
        negative = words.below(2 * one) == 1
        good &= ~(negative & (value == 0))  # zero must not come twice
        # Accept with exp(-(|value| - σ)² / 2σ²).  With ||value| - σ| = qσ + r the exponent is q²/2 + q r/σ + r²/2σ².
        q, r = np.divmod(np.abs(value - sigma), sigma)
        for accept in _acceptance(q, r, scale):
            still = np.flatnonzero(good)
            good[still] = accept(words, still)
        out[missing[good]] = np.where(negative, -value, value)[good]
        missing = missing[~good]
    return out


def _acceptance(q: Ints, r: Ints, scale: Ints) -> list[Callable[[_Words, Ints], NDArray[np.bool_]]]:
    one = np.ones_like(q)

    def squares(words: _Words, i: Ints) -> NDArray[np.bool_]:
        return _all_of(words, q[i] * q[i] // 2, [(one[i], one[i])])

    def odd_half(words: _Words, i: Ints) -> NDArray[np.bool_]:
        return _all_of(words, q[i] % 2, [(one[i], 2 * one[i])])

    def mixed(words: _Words, i: Ints) -> NDArray[np.bool_]:
        return _all_of(words, q[i], [(r[i], scale[i])])

    def rest(words: _Words, i: Ints) -> NDArray[np.bool_]:
        return _bernoulli_exp(words, [(one[i], 2 * one[i]), (r[i], scale[i]), (r[i], scale[i])])

    return [rest, mixed, odd_half, squares]


def exact_noisy_mean(
    clipped: GridGradient,
    *,
    noise_multiplier: float,
    expected_examples: float,
    randomness: Randomness,
    step: int,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The discrete Gaussian mechanism on a sum in grid units, turned into numbers and divided by the expected batch.

    Formal guarantee: on integer vectors with L2 sensitivity D, discrete Gaussian noise of parameter σ satisfies the
    same bounds on Rényi divergences as the continuous one, for every order (CKS 2020, section 2);
    σ = ceil(noise_multiplier * D) here.  The accountant treats the Poisson-subsampled mechanism as its continuous
    counterpart, of which it is an approximation finer than exp(-2π²σ²) at σ >= 2^10, which is required.  The division
    and the conversion to `dtype` are post-processing.

    Args:
        clipped: the sum.
        noise_multiplier: z > 0.
        expected_examples: sampling rate times declared number of records, > 0.
        randomness: the run's secret streams.
        step: number of the step.
        dtype: of the result.

    Raises:
        ConfigError: the grid is so coarse that σ would be below 2^10 grid units.
    """
    if not noise_multiplier > 0 or not expected_examples > 0:
        raise ValueError(
            f"noise_multiplier={noise_multiplier} and expected_examples={expected_examples} must be positive."
        )
    sigma = math.ceil(noise_multiplier * clipped.l2_sensitivity)
    if sigma < SMALLEST_SIGMA:
        raise ConfigError(
            f"the noise would have a standard deviation of {sigma} steps of the grid, but must have at least "
            f"{SMALLEST_SIGMA}: choose a finer grid (see default_grid)."
        )
    sizes = [s.numel() for s in clipped.sums]
    noise = torch.from_numpy(discrete_gaussian(randomness, step, sum(sizes), sigma)).split(sizes)
    return [
        ((s + n.view(s.shape).to(s.device)).double() * (clipped.grid / expected_examples)).to(dtype)
        for s, n in zip(clipped.sums, noise, strict=True)
    ]
