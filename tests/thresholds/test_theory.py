"""Bounds on the gap of optimal denoisers hold on toys that are known exactly, and are met where they say so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from tests.thresholds.toys import ExactMixture, gap_in_one_dimension, gaussian_gap, gaussian_loss, kl_of_gaussians

# ------------------------------------------------- bounds of docs/stages.md that the package itself does not need


def kl_bound(w2: float, sigma: float) -> float:
    """KL(p_σ ‖ q_σ) <= W₂(p, q)²/(2σ²), in nats: the joint convexity of KL along the optimal coupling."""
    return w2**2 / (2 * sigma**2)


def tau_for_kl(w2: float, nats: float) -> float:
    """The log σ above which kl_bound is at most `nats`."""
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
        smoothing: s >= 0 as in cleaning_gap_bound.

    A change of measure from p to q costs the factor M, and D(x) = x already has a loss of dσ².
    """
    return ratio * pixels * sigma**4 / (sigma**2 + smoothing**2)


def smoothed_loss_floor(sigma: float, smoothing: float, pixels: int) -> float:
    """mmse_p(σ) >= d·σ²s²/(σ² + s²) for images that carry noise of standard deviation s: none can guess that noise."""
    return pixels * (sigma * smoothing) ** 2 / (sigma**2 + smoothing**2)


# ----------------------------------------------------------------------------------------------- the toys

SIGMAS = [math.exp(u) for u in np.linspace(-6, 5, 23)]


def atoms(points: list[float], weights: list[float], smoothing: float = 0.0) -> ExactMixture:
    return ExactMixture(weights, [[p] for p in points], [[[smoothing**2]]] * len(points))


# p and q on [-1, 1], a ball of radius 1.
PAIRS = [
    (atoms([-1, 1], [0.5, 0.5]), atoms([-1, 0, 1], [0.3, 0.4, 0.3])),
    (atoms([-1, 1], [0.5, 0.5]), atoms([0.0], [1.0])),
    (atoms([1.0], [1.0]), atoms([-1.0], [1.0])),
    (atoms([-0.9, 0.2, 0.8], [0.2, 0.5, 0.3]), atoms([-0.5, 1.0], [0.9, 0.1])),
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("known", [False, True])
def test_coarse_bound_holds_on_the_line(pair, known) -> None:
    p, q = pair
    facts = {}
    if known:
        # On the line W₂ is the distance of the quantile functions.
        u = (np.arange(20_000) + 0.5) / 20_000
        exact = [m.means[:, 0].numpy()[np.searchsorted(np.cumsum(m.weights.numpy()), u)] for m in pair]
        facts = {
            "mean_difference": float((p.mean - q.mean).norm()),
            "variance_p": p.variance,
            "variance_q": q.variance,
            "w2": float(np.sqrt(np.mean((exact[0] - exact[1]) ** 2))),
        }
    for sigma in SIGMAS:
        gap, loss = gap_in_one_dimension(p, q, sigma)
        assert gap <= coarse_gap_bound(sigma, 1.0, **facts) + 1e-9, sigma
        assert p.variance - loss <= explained_share_bound(1.0, sigma) * p.variance + 1e-9, sigma


def test_explained_share_is_met_by_two_opposite_images() -> None:
    p = atoms([-1, 1], [0.5, 0.5])
    for sigma in (20.0, 80.0):
        _, loss = gap_in_one_dimension(p, p, sigma)
        assert 1 - loss / p.variance == pytest.approx(explained_share_bound(1.0, sigma), rel=3 / sigma**2)


def test_coarse_gap_is_of_order_one_over_sigma_squared_and_keeps_the_means() -> None:
    same_mean, other_mean = PAIRS[1], PAIRS[3]
    gaps = [gap_in_one_dimension(*same_mean, sigma)[0] for sigma in (20.0, 40.0)]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02)
    far, _ = gap_in_one_dimension(*other_mean, 300.0)
    assert far == pytest.approx(float((other_mean[0].mean - other_mean[1].mean).square().sum()), rel=0.01)


def test_kl_bound_holds_and_is_met_by_shifted_gaussians() -> None:
    a = ExactMixture.gaussian([0.3, -0.2], [[0.2, 0.05], [0.05, 0.1]])
    b = ExactMixture.gaussian([-0.5, 0.4], [[0.2, 0.05], [0.05, 0.1]])
    w2 = float((a.mean - b.mean).norm())  # of Gaussians with one covariance
    for sigma in (0.05, 0.5, 5.0, 50.0):
        kl = kl_of_gaussians(a.smoothed(sigma), b.smoothed(sigma))
        assert 0 < kl <= kl_bound(w2, sigma)
    assert kl == pytest.approx(kl_bound(w2, 50.0), rel=1e-3)
    assert kl_bound(w2, math.exp(tau_for_kl(w2, 0.01))) == pytest.approx(0.01)


def test_data_range() -> None:
    """[-1, 1]^784 has diameter 2√784 = 56; beyond log σ = 2 the worst case is 28.7 nats, at σ = 80 a quarter."""
    assert kl_bound(56, math.exp(2)) == pytest.approx(28.72, abs=0.01)
    assert kl_bound(56, 80) == pytest.approx(0.245)
    assert coarse_gap_bound(1e-3, 28.0) == 56.0**2


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
@pytest.mark.parametrize(("first", "second"), [([-1.0, 1.0], [-0.2, 0.6]), ([-1.0, -1.0], [1.0, 1.0])])
def test_cleaning_bound_of_smoothed_images(smoothing, first, second) -> None:
    p, q = (atoms(points, [0.5, 0.5], smoothing) for points in (first, second))
    for sigma in SIGMAS:
        gap, loss = gap_in_one_dimension(p, q, sigma)
        assert gap <= cleaning_gap_bound(sigma, smoothing, 1.0) * (1 + 1e-6)
        assert loss >= smoothed_loss_floor(sigma, smoothing, 1) * (1 - 1e-6) - 1e-12


def test_cleaning_bound_is_met_and_of_order_sigma_to_the_fourth() -> None:
    p, q = atoms([1.0], [1.0], 0.3), atoms([-1.0], [1.0], 0.3)
    for sigma in (0.001, 0.01, 0.1):
        # Two images at the ends of the range with a sensor's noise: nothing is further apart.
        gap = gaussian_gap(p, q, sigma)
        assert gap == pytest.approx(cleaning_gap_bound(sigma, 0.3, 1.0), rel=1e-9)
    assert cleaning_gap_bound(0.002, 0.3, 1.0) / cleaning_gap_bound(0.001, 0.3, 1.0) == pytest.approx(16, rel=1e-3)


def test_without_smoothing_the_gap_of_two_images_does_not_fall() -> None:
    p, q = atoms([1.0], [1.0]), atoms([-1.0], [1.0])
    assert [gap_in_one_dimension(p, q, s)[0] for s in (0.001, 0.1, 10)] == pytest.approx([4, 4, 4])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cleaning_bound_by_the_ratio_of_densities(smoothing) -> None:
    p = atoms([-0.5, 0.0, 0.5], [0.7, 0.2, 0.1], smoothing)
    q = atoms([-0.5, 0.0, 0.5], [0.2, 0.2, 0.6], smoothing)
    ratio = 3.5
    tight = 0.0
    for sigma in SIGMAS:
        gap, _ = gap_in_one_dimension(p, q, sigma)
        bound = cleaning_gap_bound_by_ratio(sigma, ratio, 1, smoothing)
        assert gap <= bound * (1 + 1e-9)
        tight = max(tight, gap / bound)
    assert tight > 0.01  # not so loose that nothing could break it


def test_price_is_the_kl_divergence() -> None:
    a = ExactMixture.gaussian([0.3, -0.2], [[0.2, 0.05], [0.05, 0.1]])
    b = ExactMixture.gaussian([0.1, 0.4], [[0.1, -0.02], [-0.02, 0.4]])
    for tau in (-2.0, 0.0, 1.0):
        u = np.linspace(tau, 9, 4001)
        gaps = np.array([gaussian_gap(a, b, math.exp(v)) for v in u])
        exact = kl_of_gaussians(a.smoothed(math.exp(tau)), b.smoothed(math.exp(tau)))
        assert trapezoid(gaps * np.exp(-2 * u), u) == pytest.approx(exact, rel=1e-3)
    u = np.linspace(-9, 9, 4001)
    whole = trapezoid(np.array([gaussian_gap(a, b, math.exp(v)) for v in u]) * np.exp(-2 * u), u)
    assert whole == pytest.approx(kl_of_gaussians(a, b), rel=1e-3)


def test_orthogonality_what_the_student_loses_is_the_gap() -> None:
    a = ExactMixture.gaussian([0.3, -0.2], [[0.2, 0.05], [0.05, 0.1]])
    b = ExactMixture.gaussian([0.1, 0.4], [[0.1, -0.02], [-0.02, 0.4]])
    sigma, n = 0.5, 400_000
    x0 = a.sample(n, 1)
    x = x0 + sigma * torch.randn(n, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = float((b.denoise(x, sigma) - x0).square().sum(1).mean())
    assert loss == pytest.approx(gaussian_loss(a, sigma) + gaussian_gap(a, b, sigma), rel=0.01)
