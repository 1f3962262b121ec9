"""How far apart the optimal denoisers of two image distributions can be: bounds at either end of the log σ axis.

Notation: p and q are distributions of images x₀ with d pixels in all; p_σ = p∗N(0, σ²I); D_p(x; σ) = E_p[x₀ | x] is the
optimal denoiser of p, mmse_p(σ) = E|D_p(x) - x₀|² its loss; both summed over the pixels, x drawn from p_σ.  The gap is

    G(σ) = E|D_p(x; σ) - D_q(x; σ)|², x ~ p_σ,

and is exactly what q's denoiser loses on p's images: E|D_q(x) - x₀|² = mmse_p(σ) + G(σ), as D_p(x) is the conditional
mean.  R is the radius of a ball that holds all images: √d for pixels in [-1, 1].  docs/stages.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def data_radius(pixels: int) -> float:
    """R = √d: the ball about 0 that holds [-1, 1]^d; its diameter, 2√d, bounds every W₂ distance there."""
    if pixels < 1:
        raise ValueError(f"pixels is {pixels}, but must be at least 1.")
    return math.sqrt(pixels)


# ----------------------------------------------------------------------------------------------- coarse


def kl_bound(w2: float, sigma: float) -> float:
    """KL(p_σ ‖ q_σ) <= W₂(p, q)²/(2σ²), in nats: the joint convexity of KL along the optimal coupling.

    Args:
        w2: W₂(p, q), or any bound on it, such as twice :func:`data_radius`.
        sigma: σ > 0.
    """
    return w2**2 / (2 * sigma**2)


def tau_for_kl(w2: float, nats: float) -> float:
    """The log σ above which :func:`kl_bound` is at most `nats`."""
    if w2 <= 0 or nats <= 0:
        raise ValueError(f"w2 = {w2} and nats = {nats} must be positive.")
    return math.log(w2 / math.sqrt(2 * nats))


def explained_share_bound(radius: float, sigma: float) -> float:
    """1 - mmse_p(σ)/mmse_p(∞) <= R²/σ²: how much of the images' variance any denoiser can explain; 1 at most.

    For every p in a ball of radius R.  The images ±R, each with probability ½, attain it as σ → ∞.
    """
    return min(1.0, (radius / sigma) ** 2)


def coarse_gap_bound(
    sigma: float,
    radius: float,
    *,
    mean_difference: float | None = None,
    variance_p: float | None = None,
    variance_q: float | None = None,
    w2: float | None = None,
) -> float:
    """An upper bound on G(σ) for p and q in one ball of radius R, of order R²/σ² beside the means' difference.

    √G <= |m_p - m_q| + (R/σ)(√V_p + √V_q) + (R²/σ²)·W₂(p, q), and never more than 2R.

    Args:
        sigma: σ > 0.
        radius: R.
        mean_difference: |m_p - m_q| of the mean images; the part of the gap that no σ removes.
        variance_p, variance_q: V = mmse(∞), the summed variances of the pixels.
        w2: W₂(p, q).

    What is None is bounded by what the ball allows: 2R, R² and 2R.
    """
    shift = 2 * radius if mean_difference is None else mean_difference
    spread = sum(radius if v is None else math.sqrt(v) for v in (variance_p, variance_q))
    distance = 2 * radius if w2 is None else w2
    root = shift + radius / sigma * spread + (radius / sigma) ** 2 * distance
    return min(root, 2 * radius) ** 2


# --------------------------------------------------------------------------------------------- cleaning


def cleaning_gap_bound(sigma: float, smoothing: float, radius: float) -> float:
    """An upper bound on G(σ) of order σ⁴, for images that carry noise of their own: (2R)²·(σ²/(σ² + s²))².

    Both p and q are distributions in a ball of radius R, convolved with N(0, s²I) (a sensor's noise, or a dither).
    D_p(x; σ) = x + σ²∇log p_σ(x), and the scores of smoothed distributions differ by at most 2R/(σ² + s²) everywhere.
    Without smoothing there is no bound that falls with σ: two different single images have G = their distance squared.

    Args:
        sigma: σ > 0.
        smoothing: s > 0, the standard deviation of that noise.
        radius: R.
    """
    return (2 * radius * sigma**2 / (sigma**2 + smoothing**2)) ** 2


def cleaning_gap_bound_by_ratio(sigma: float, ratio: float, pixels: int, smoothing: float = 0.0) -> float:
    """An upper bound on G(σ) if q's images include p's: M·d·σ⁴/(σ² + s²), so M·d·σ² without smoothing.

    Args:
        sigma: σ > 0.
        ratio: M >= 1 with dp/dq <= M (before the smoothing).
        pixels: d.
        smoothing: s >= 0 as in :func:`cleaning_gap_bound`.

    A change of measure from p to q costs the factor M, and D(x) = x already has a loss of dσ².
    """
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}, but a bound on dp/dq is at least 1.")
    return ratio * pixels * sigma**4 / (sigma**2 + smoothing**2)


def smoothed_loss_floor(sigma: float, smoothing: float, pixels: int) -> float:
    """mmse_p(σ) >= d·σ²s²/(σ² + s²) for images that carry noise of standard deviation s: none can guess that noise."""
    return pixels * (sigma * smoothing) ** 2 / (sigma**2 + smoothing**2)


# ------------------------------------------------------------------------------------------------ price


def price_density(sigma: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """G(σ)/σ²: nats for each unit of log σ that q's denoiser answers in place of p's (see :func:`price`)."""
    return np.asarray(gap / sigma**2)


def price(log_sigma: Sequence[float] | NDArray[np.float64], gap: NDArray[np.float64]) -> float:
    """∫ G(σ)/σ² d log σ in nats, by the trapezoidal rule: what it costs to let q's denoiser own these noise levels.

    Over log σ > τ the exact integral is KL(p_τ ‖ q_τ) (de Bruijn's identity), and over log σ < τ it bounds what q's
    denoiser adds to the KL divergence of the samples from p (Girsanov's theorem, reverse diffusion); over the whole
    axis it is KL(p ‖ q).

    Args:
        log_sigma: [M], ascending; one point alone costs nothing.
        gap: [M], summed over the pixels.
    """
    u = np.asarray(log_sigma, dtype=np.float64)
    density = price_density(np.exp(u), np.asarray(gap, dtype=np.float64))
    return float((np.diff(u) * (density[1:] + density[:-1])).sum() / 2)


__all__ = [
    "cleaning_gap_bound",
    "cleaning_gap_bound_by_ratio",
    "coarse_gap_bound",
    "data_radius",
    "explained_share_bound",
    "kl_bound",
    "price",
    "price_density",
    "smoothed_loss_floor",
    "tau_for_kl",
]
