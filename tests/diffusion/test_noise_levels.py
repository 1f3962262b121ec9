"""The density of noise levels, cut to a stage."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dpsyngen.diffusion.noise_levels import NoiseLevels

INTERVALS = [(-math.inf, math.inf), (-math.inf, -3), (-3, 2), (2, math.inf), (-3, math.inf), (4.5, 5.0), (-9, -8.5)]


@pytest.mark.parametrize(("low", "high"), INTERVALS)
@pytest.mark.parametrize("copies", [1, 4])
def test_density_is_the_truncated_normal(low, high, copies) -> None:
    levels = NoiseLevels(low=low, high=high)
    sigma = levels.sample(5000, copies, torch.Generator().manual_seed(0))
    assert sigma.shape == (5000, copies)
    log_sigma = sigma.double().log().flatten().numpy()
    # sigma is fp32: a relative error of 6e-8 at the edges.
    assert log_sigma.min() >= low - 1e-6
    assert log_sigma.max() <= high + 1e-6
    a, b = (low + 1.2) / 1.2, (high + 1.2) / 1.2
    assert stats.kstest(log_sigma, stats.truncnorm(a, b, -1.2, 1.2).cdf).pvalue > 1e-4


@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_mass(low, high) -> None:
    expected = stats.norm(-1.2, 1.2).cdf(high) - stats.norm(-1.2, 1.2).cdf(low)
    assert NoiseLevels(low=low, high=high).mass == pytest.approx(expected, rel=1e-3)


def test_the_published_thresholds_cut_away_little() -> None:
    assert NoiseLevels(high=-3).mass == pytest.approx(0.067, abs=0.001)
    assert NoiseLevels(low=2).mass == pytest.approx(0.0038, abs=0.0002)


def test_copies_are_stratified() -> None:
    levels = NoiseLevels(low=-3, high=2)
    sigma = levels.sample(500, 4, torch.Generator().manual_seed(1))
    edges = levels.quantile(torch.linspace(0, 1, 5))
    for k in range(4):
        assert (sigma[:, k] >= edges[k] * (1 - 1e-6)).all()
        assert (sigma[:, k] <= edges[k + 1] * (1 + 1e-6)).all()
    # Less variance of the mean over copies than independent draws have.
    spread = sigma.log().mean(1).var()
    assert spread < 0.3 * sigma.log().flatten().var() / 4


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must be below"):
        NoiseLevels(low=1, high=1)
    with pytest.raises(ValueError, match="must be positive"):
        NoiseLevels(std=0)
