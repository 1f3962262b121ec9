"""The measured gap is the exact one where that is known, image by image, and its average has an honest spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpsyngen.thresholds.gap import (
    HIGHEST,
    LOWEST,
    GapCurve,
    log_sigma_grid,
    mean_curve,
    measure,
    seeded_noise,
)
from tests.thresholds.toys import (
    ExactMixture,
    gap_in_one_dimension,
    gaussian_gap,
    gaussian_loss,
)

LEVELS = (-4.0, -2.0, -1.0, 0.0, 1.5, 4.0)


@pytest.fixture(scope="module")
def gaussians() -> tuple[ExactMixture, ExactMixture]:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    means = 0.5 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    first, second = (ExactMixture.gaussian(m, f @ f.T / 8) for m, f in zip(means, factors, strict=True))
    return first, second


def answers(a: ExactMixture, b: ExactMixture, count: int, levels=LEVELS, **options):
    side = int(math.sqrt(a.dimension))
    images = a.sample(count, 5).float().view(count, 1, side, side)
    noise = seeded_noise((1, side, side), 7)
    return measure({"a": a, "b": b}, images, levels, [("a", "b")], noise, **options)


def test_gap_and_loss_of_gaussians_are_the_closed_forms(gaussians) -> None:
    a, b = gaussians
    found = answers(a, b, 6000, block=3000)
    for m, level in enumerate(LEVELS):
        sigma, d = math.exp(level), a.dimension
        gap, loss = found.gaps["a", "b"][:, m], found.losses["a"][:, m]
        for sampled, exact in ((gap, gaussian_gap(a, b, sigma) / d), (loss, gaussian_loss(a, sigma) / d)):
            error = sampled.std() / math.sqrt(len(sampled))
            assert abs(sampled.mean() - exact) < 4 * error, level
            assert error < 0.05 * exact


def test_gap_of_mixtures_is_that_of_quadrature() -> None:
    a = ExactMixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.02]], [[0.1]]])
    b = ExactMixture([0.7, 0.3], [[-0.6], [0.8]], [[[0.1]], [[0.01]]])
    found = answers(a, b, 6000, block=3000)
    for m, level in enumerate(LEVELS):
        exact = gap_in_one_dimension(a, b, math.exp(level))
        for sampled, wanted in zip((found.gaps["a", "b"][:, m], found.losses["a"][:, m]), exact, strict=True):
            assert abs(sampled.mean() - wanted) < 4 * sampled.std() / math.sqrt(len(sampled)), level


def test_relative_gap_and_excess_of_optimal_denoisers_are_one(gaussians) -> None:
    a, b = gaussians
    found = answers(a, b, 6000, block=3000)
    curve = curve_of(found)
    exact = [gaussian_gap(a, b, math.exp(u)) / gaussian_loss(a, math.exp(u)) for u in LEVELS]
    np.testing.assert_allclose(curve.relative()[0], exact, rtol=0.1)
    np.testing.assert_allclose(curve.excess()[0], curve.relative()[0], rtol=0.1, atol=0.03)


def curve_of(found) -> GapCurve:
    return GapCurve("programs", "a", "b", found.gaps["a", "b"][None], found.losses["a"][None], found.losses["b"][None])


def test_parts_and_threads_change_nothing(gaussians) -> None:
    from dpsyngen.workers import Workers

    a, b = gaussians
    seen = []
    whole = answers(a, b, 37, block=64)
    for options in ({"block": 5}, {"block": 3, "workers": Workers(2), "on_progress": seen.append}):
        parts = answers(a, b, 37, **options)
        np.testing.assert_allclose(parts.gaps["a", "b"], whole.gaps["a", "b"], rtol=1e-6)
        np.testing.assert_allclose(parts.losses["b"], whole.losses["b"], rtol=1e-6)
    assert seen == sorted(seen)
    assert seen[-1] == 37


def test_noise_belongs_to_the_image_and_is_standard_normal() -> None:
    noise = seeded_noise((1, 4, 4), 3)
    assert torch.equal(noise(slice(2, 5))[1], noise(slice(3, 4))[0])
    assert not torch.equal(noise(slice(0, 1)), seeded_noise((1, 4, 4), 4)(slice(0, 1)))
    many = noise(slice(0, 3000))
    assert float(many.mean()) == pytest.approx(0, abs=0.02)
    assert float(many.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((many[:-1] * many[1:]).mean())) < 0.02


def test_grid() -> None:
    grid = log_sigma_grid()
    assert (grid[0], grid[-1]) == (LOWEST, HIGHEST)
    assert np.diff(grid) == pytest.approx(np.diff(grid)[0])
    assert np.diff(grid)[0] == pytest.approx(0.5, abs=0.02)
    assert len(log_sigma_grid(50)) == 3


# -------------------------------------------------------------------------------------------- bootstrap


def made(gaps: np.ndarray, losses: np.ndarray) -> GapCurve:
    """A curve of one level from [S, N]."""
    return GapCurve("programs", "t", "s", gaps[:, :, None], losses[:, :, None], (gaps + losses)[:, :, None])


def test_bootstrap_covers_the_truth_over_images() -> None:
    """95 % intervals over images hold the exact ratio about 95 times in a hundred."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        loss = rng.gamma(4, 0.25, (1, 60))
        gap = 0.2 * loss * rng.gamma(2, 0.5, (1, 60))
        drawn = mean_curve([made(gap, loss)], 200, seed).relative.drawn[:, 0]
        low, high = np.percentile(drawn, [2.5, 97.5])
        hits += low <= 0.2 <= high
    assert 85 <= hits <= 99


def test_bootstrap_sees_the_spread_between_networks() -> None:
    loss = np.ones((4, 50))
    gap = np.array([[0.1], [0.2], [0.3], [0.4]]) * loss
    together = mean_curve([made(gap, loss)], 500)
    assert together.relative.curve[0] == pytest.approx(0.25)
    assert together.excess.curve[0] == pytest.approx(0.25)
    spread = together.relative.drawn[:, 0].std()
    assert spread == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4]) / 2, rel=0.15)
    np.testing.assert_allclose(together.excess.drawn, together.relative.drawn)
    # The same networks in curves of their own count the same.
    apart = mean_curve([made(gap[i : i + 1], loss[:1]) for i in range(4)], 500)
    np.testing.assert_array_equal(apart.relative.drawn, together.relative.drawn)
    alone = mean_curve([made(gap[:1], loss[:1])], 50)
    assert alone.relative.drawn.std() < 1e-12
