"""Gaussian noise from a cryptographically secure stream.

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

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.privacy.per_example import ClippedGradient
from dpsyngen.privacy.randomness import Purpose, Randomness
from dpsyngen.privacy.sharding.places import ShardedGradient

_SUMMED = 4
_CHUNK = 1 << 15  # samples at a time: the temporary arrays stay within the cache
_UNIT = 2.0**-53


def standard_normal(randomness: Randomness, step: int, count: int, purpose: Purpose = "noise") -> NDArray[np.float32]:
    """`count` samples of N(0, 1), a pure function of (key, purpose, step)."""
    out = np.empty(count, dtype=np.float32)
    _fill(out, randomness, step, purpose)
    return out


def fine_normal(randomness: Randomness, step: int, count: int, purpose: Purpose) -> NDArray[np.float64]:
    """The same samples before they are rounded to fp32, for noise that is then rounded to a grid of its own."""
    out = np.empty(count, dtype=np.float64)
    _fill(out, randomness, step, purpose)
    return out


def standard_normal_parts(
    randomness: Randomness, step: int, count: int, spans: Iterable[tuple[int, int]], purpose: Purpose = "noise"
) -> Iterator[NDArray[np.float32]]:
    """Parts of ``standard_normal(randomness, step, count, purpose)``, bit by bit, one at a time.

    Only what lies near the spans is drawn, and only one part of it is in memory.

    Args:
        randomness, step, count, purpose: as there; `count` is that of the whole.
        spans: (start, length) of each part.  In ascending order nothing is drawn twice.
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
                last, chunk = part, _chunk(randomness, step, purpose, part, min(_CHUNK, count - part * _CHUNK))
            n = min(len(chunk) - offset, start + length - position)
            out[position - start : position - start + n] = chunk[offset : offset + n]
            position += n
        yield out


def _fill(out: NDArray[np.floating], randomness: Randomness, step: int, purpose: Purpose) -> None:
    count = len(out)
    for part, start in enumerate(range(0, count, _CHUNK)):
        n = min(_CHUNK, count - start)
        out[start : start + n] = _chunk(randomness, step, purpose, part, n)


def _chunk(randomness: Randomness, step: int, purpose: Purpose, part: int, n: int) -> NDArray[np.float64]:
    """The `n` samples from number part * _CHUNK on; which they are depends on n, too."""
    # Half as many pairs of uniforms as Gaussians: each gives radius * cos and radius * sin of one angle, whose sum
    # is sqrt(2) * radius * cos(angle - pi/4); and that angle is uniform, too.
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


def noisy_mean(
    clipped: ClippedGradient,
    *,
    noise_multiplier: float,
    expected_examples: float,
    randomness: Randomness,
    step: int,
) -> list[torch.Tensor]:
    """The Gaussian mechanism on a clipped sum, divided by the *expected* number of examples.

    Formal guarantee: with the examples of this step chosen by Poisson sampling at rate q, the result is one run of
    the Poisson-subsampled Gaussian mechanism with rate q and the given noise multiplier (noise standard deviation
    over sensitivity), under adding or removing one record.  The divisor is a constant, so dividing is
    post-processing; the realised number of examples must never be used for it.

    Args:
        clipped: the sum; the noise is scaled from its own ``l2_sensitivity``.
        noise_multiplier: z >= 0; the noise has standard deviation z * l2_sensitivity in each coordinate.
        expected_examples: sampling rate times declared number of records, > 0.
        randomness: the run's secret streams.
        step: number of the step; each step has its own noise.

    Returns:
        one tensor for each of ``clipped.sums``.  Of a model that is split over processes each gets its own part of the
        same noise that one process would have added, so that every coordinate has noise once; see
        :mod:`dpsyngen.privacy.sharding.sharded`.
    """
    if noise_multiplier < 0 or expected_examples <= 0:
        raise ValueError(
            f"noise_multiplier={noise_multiplier} must be >= 0 and expected_examples={expected_examples} > 0."
        )
    if noise_multiplier == 0:
        return [total / expected_examples for total in clipped.sums]
    if not math.isfinite(clipped.l2_sensitivity):
        raise ValueError("the sum has no finite sensitivity, so no noise makes it private: clip it first.")
    scale = noise_multiplier * clipped.l2_sensitivity
    if isinstance(clipped, ShardedGradient):
        spans = (place.span for place in clipped.places)
        drawn = standard_normal_parts(randomness, step, clipped.coordinates, spans)
        return [
            place.like(total, (own + scale * place.cut(noise, own)) / expected_examples)
            for total, place, noise in zip(clipped.sums, clipped.places, drawn, strict=True)
            for own in (place.own(total),)
        ]
    sizes = [s.numel() for s in clipped.sums]
    noise = torch.from_numpy(standard_normal(randomness, step, sum(sizes))).split(sizes)
    return [
        (total + scale * n.view(total.shape).to(total.device, total.dtype)) / expected_examples
        for total, n in zip(clipped.sums, noise, strict=True)
    ]
