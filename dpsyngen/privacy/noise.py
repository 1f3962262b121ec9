"""Gaussian noise from a cryptographically secure stream, and the mechanisms that add it.

A *mechanism* is an object that sums an engine's gradients (``sum``) and releases the sum (``release``): everything
before ``release`` is private, everything after it public.  There are :class:`GaussianMechanism`,
:class:`dpsyngen.privacy.exact.DiscreteGaussian` and :class:`NoPrivacy` (ε = ∞).

What is hardened, and what is not:

- The stream cannot be predicted without the run's key (AES-256 in counter mode, see ``randomness``).
- The *sampler*: Box-Muller in floating point reaches only some numbers, and which ones can betray its inputs (Mironov,
  "On significance of the least significant bits for differential privacy", CCS 2012).  Each sample here is the
  scaled sum of four such Gaussians, which makes it infeasible to invert it (Holohan & Braghin, "Secure random sampling
  in differential privacy", ESORICS 2021).
- The *addition* of noise to a floating-point sum, and the rounding inside that sum, are not hardened: which results
  are reachable still depends, in the last bits, on the sum.  ``dpsyngen.privacy.exact`` computes in whole numbers
  instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.errors import require
from dpsyngen.privacy.clipping import ClippedGradient
from dpsyngen.privacy.per_example import Loss, PerExampleGradients
from dpsyngen.privacy.randomness import Purpose, Randomness
from dpsyngen.workers import summed_gradients

_SUMMED = 4  # Gaussians in a sample, each of which hides the others
_CHUNK = 1 << 15  # samples at a time: the temporary arrays stay within the cache
_UNIT = 2.0**-53


@dataclass(frozen=True)
class GaussianMechanism:
    """The Gaussian mechanism on a sum of clipped gradients; see :func:`noisy_mean` for the guarantee.

    Attributes:
        noise_multiplier: z > 0.
        expected_examples: the constant divisor, sampling rate times declared number of records, > 0.
    """

    noise_multiplier: float
    expected_examples: float

    def __post_init__(self) -> None:
        z, expected = self.noise_multiplier, self.expected_examples
        require(z > 0, "noise_multiplier", z, "positive")
        require(expected > 0, "expected_examples", expected, "positive")

    def sum(
        self, engine: PerExampleGradients, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32
    ) -> ClippedGradient:
        """The sum over examples of their clipped gradients; arguments as of :meth:`PerExampleGradients.sum`."""
        return engine.sum(loss, examples, copies=copies, physical_batch=physical_batch)

    def release(self, total: ClippedGradient, randomness: Randomness, step: int) -> list[Tensor]:
        """The noisy mean, one tensor a parameter: public from here on."""
        z, expected = self.noise_multiplier, self.expected_examples
        return noisy_mean(total, noise_multiplier=z, expected_examples=expected, randomness=randomness, step=step)


@dataclass(frozen=True)
class NoPrivacy:
    """Neither clipping nor noise, for a non-private reference.  Formal guarantee: none, ε = ∞."""

    expected_examples: float

    def sum(
        self, engine: PerExampleGradients, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32
    ) -> ClippedGradient:
        """The unclipped sum of gradients; its sensitivity is infinite, so no mechanism takes it for a clipped one."""
        sums = engine.zero().sums
        for start in range(0, examples, physical_batch):
            count = min(physical_batch, examples - start)

            def of_piece(part: slice, start: int = start) -> Tensor:
                return loss(slice(start + part.start, start + part.stop))

            gradients, _ = summed_gradients(engine.parameters, of_piece, count, engine.workers)
            torch._foreach_add_(sums, gradients, alpha=1 / copies)
        return ClippedGradient(sums, math.inf, examples, sums[0].new_zeros(0), 0)

    def release(self, total: ClippedGradient, randomness: Randomness, step: int) -> list[Tensor]:
        return [s / self.expected_examples for s in total.sums]


StepMechanism = GaussianMechanism | NoPrivacy
"""Sums the clipped gradients of a step and releases the sum."""


def noisy_mean(
    clipped: ClippedGradient, *, noise_multiplier: float, expected_examples: float, randomness: Randomness, step: int
) -> list[Tensor]:
    """The Gaussian mechanism on a clipped sum, divided by the *expected* number of examples.

    Formal guarantee: with the examples of this step chosen by Poisson sampling at rate q, the result is one run of
    the Poisson-subsampled Gaussian mechanism with rate q and the given noise multiplier (noise standard deviation
    over sensitivity), under adding or removing one record.  The divisor is a constant, so dividing is
    post-processing; the realised number of examples must never be used for it.

    Args:
        clipped: the sum; the noise has standard deviation z times its own ``l2_sensitivity`` in each coordinate.
        noise_multiplier: z >= 0.
        expected_examples: sampling rate times declared number of records, > 0.
        randomness, step: the run's secret streams, and the number of the step: each has its own noise.

    Returns:
        one tensor for each of ``clipped.sums``.  Of a model that is split over processes each gets its own part of the
        same noise that one process would have added, so that every coordinate has noise once.
    """
    require(noise_multiplier >= 0, "noise_multiplier", noise_multiplier, ">= 0")
    require(expected_examples > 0, "expected_examples", expected_examples, "> 0")
    if noise_multiplier == 0:
        return [total / expected_examples for total in clipped.sums]
    if not math.isfinite(clipped.l2_sensitivity):
        raise ValueError("the sum has no finite sensitivity, so no noise makes it private: clip it first.")
    draw = partial(standard_normal_parts, randomness, step)
    return clipped.noisy(noise_multiplier * clipped.l2_sensitivity, expected_examples, draw)


def fine_normal(randomness: Randomness, step: int, count: int, purpose: Purpose) -> NDArray[np.float64]:
    """`count` samples of N(0, 1), a pure function of (key, purpose, step), for noise that is rounded to a grid."""
    starts = range(0, count, _CHUNK)
    chunks = [_chunk(randomness, step, purpose, i, min(_CHUNK, count - s)) for i, s in enumerate(starts)]
    return np.concatenate([np.empty(0), *chunks])


def standard_normal_parts(
    randomness: Randomness, step: int, count: int, spans: Iterable[tuple[int, int]]
) -> Iterator[NDArray[np.float32]]:
    """The parts (start, length) of ``fine_normal(randomness, step, count, "noise")`` in fp32, one at a time.

    Only what lies near them is drawn, in ascending order nothing twice.
    """
    last, chunk = -1, np.empty(0)
    for start, length in spans:
        if start < 0 or length < 0 or start + length > count:
            raise ValueError(f"the span ({start}, {length}) does not lie within the {count} samples.")
        out = np.empty(length, dtype=np.float32)
        position = start
        while position < start + length:
            part, offset = divmod(position, _CHUNK)
            if part != last:
                last, chunk = part, _chunk(randomness, step, "noise", part, min(_CHUNK, count - part * _CHUNK))
            n = min(len(chunk) - offset, start + length - position)
            out[position - start : position - start + n] = chunk[offset : offset + n]
            position += n
        yield out


def _chunk(randomness: Randomness, step: int, purpose: Purpose, part: int, n: int) -> NDArray[np.float64]:
    """The `n` samples from number part * _CHUNK on; which they are depends on n, too."""
    # Half as many pairs of uniforms as Gaussians: each gives radius * cos and radius * sin of one angle, whose sum
    # is sqrt(2) * radius * cos(angle - pi/4); and that angle is uniform, too.
    # 53 bits of each word make a double in [0, 1).
    words = randomness.words(purpose, step, _SUMMED * n, part).reshape(2, _SUMMED // 2, n) >> np.uint64(11)
    radius, angle = words.astype(np.float64)
    radius += 1.0  # in (0, 1], so that its logarithm is finite
    radius *= _UNIT
    np.log(radius, out=radius)
    radius *= -2.0 * (2.0 / _SUMMED)  # sqrt(2) and the division by sqrt(4), before the root
    np.sqrt(radius, out=radius)
    angle *= 2.0 * np.pi * _UNIT
    np.cos(angle, out=angle)
    radius *= angle
    total: NDArray[np.float64] = radius.sum(0)
    return total
