"""Gaussian noise from a cryptographically secure stream.

Box-Muller on 53-bit uniforms, and each sample is the scaled sum of four such Gaussians (Holohan & Braghin,
"Secure Random Sampling in Differential Privacy", 2021), which makes it infeasible to invert the sampler and read
off which floating-point numbers it can and cannot produce.  That protects the *sampler*; the addition of noise to a
floating-point sum is not hardened against attacks on rounding (Mironov 2012 is about this step for Laplace noise).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.privacy.per_example import ClippedGradient
from dpsyngen.privacy.randomness import Purpose, Randomness

_SUMMED = 4
_CHUNK = 1 << 18  # samples at a time: keeps the temporary arrays within the cache and the memory bounded


def standard_normal(randomness: Randomness, step: int, count: int, purpose: Purpose = "noise") -> NDArray[np.float32]:
    """`count` samples of N(0, 1), a pure function of (key, purpose, step)."""
    out = np.empty(count, dtype=np.float32)
    for part, start in enumerate(range(0, count, _CHUNK)):
        n = min(_CHUNK, count - start)
        words = randomness.words(purpose, step, _SUMMED * n, part).reshape(_SUMMED // 2, 2, n)
        # u in (0, 1] so that log(u) is finite; v in [0, 1).
        u = ((words[:, 0] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        v = (words[:, 1] >> np.uint64(11)).astype(np.float64) * (2.0 * np.pi * 2.0**-53)
        radius = np.sqrt(-2.0 * np.log(u))
        out[start : start + n] = (radius * (np.cos(v) + np.sin(v))).sum(0) / np.sqrt(_SUMMED)
    return out


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
        one tensor for each of ``clipped.sums``.
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
    sizes = [s.numel() for s in clipped.sums]
    noise = torch.from_numpy(standard_normal(randomness, step, sum(sizes))).split(sizes)
    return [
        (total + scale * n.view(total.shape).to(total.device, total.dtype)) / expected_examples
        for total, n in zip(clipped.sums, noise, strict=True)
    ]
