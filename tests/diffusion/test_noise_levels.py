"""The density of noise levels, cut to a stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpsyngen.diffusion.loss import NoiseLevels

INTERVALS = [
    (-math.inf, math.inf),
    (-math.inf, -3),
    (-3, 2),
    (2, math.inf),
    (-3, math.inf),
    (4.5, 5.0),
    (-9, -8.5),
    (2, 2.001),  # a sliver
    # Beyond 8 standard deviations from the centre.
    (8.2, math.inf),
    (8, 8.5),
    (9, math.inf),
    (-math.inf, -12),
    (20, 30),
    (-31, -30),
]


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
    # And nearly as many different values as draws: nothing piles up at an edge.
    assert len(np.unique(log_sigma)) > (0.97 if high - low > 0.01 else 0.3) * log_sigma.size


@pytest.mark.parametrize(("low", "high"), [*INTERVALS, (60, math.inf), (-math.inf, -60)])
def test_every_probability_has_a_finite_level_within_the_interval(low, high) -> None:
    levels = NoiseLevels(low=low, high=high)
    log_sigma = levels.quantile(torch.tensor([0.0, 2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53, 1.0])).double().log()
    assert torch.isfinite(log_sigma).all()
    assert (log_sigma >= low - 1e-5).all()
    assert (log_sigma <= high + 1e-5).all()
    assert (log_sigma.diff() >= 0).all()


def test_other_centre_and_width() -> None:
    levels = NoiseLevels(mean=0.5, std=2.0, low=-1, high=4)
    log_sigma = levels.sample(5000, 2, torch.Generator().manual_seed(0)).double().log().flatten().numpy()
    assert stats.kstest(log_sigma, stats.truncnorm(-0.75, 1.75, 0.5, 2.0).cdf).pvalue > 1e-4


def test_same_generator_same_levels() -> None:
    a, b, c = (NoiseLevels().sample(20, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_copies_are_stratified() -> None:
    levels = NoiseLevels(low=-3, high=2)
    sigma = levels.sample(500, 4, torch.Generator().manual_seed(1))
    edges = levels.quantile(torch.linspace(0, 1, 5))
    for k in range(4):
        assert (sigma[:, k] >= edges[k] * (1 - 1e-6)).all()
        assert (sigma[:, k] <= edges[k + 1] * (1 + 1e-6)).all()
    # Within its slice each copy has the density of the slice, independently of the other copies.
    for k in range(4):
        part = stats.truncnorm(*((math.log(e) + 1.2) / 1.2 for e in (edges[k].item(), edges[k + 1].item())), -1.2, 1.2)
        assert stats.kstest(sigma[:, k].double().log().numpy(), part.cdf).pvalue > 1e-4
    correlation = np.corrcoef(sigma.log().T.numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.2
    # Less variance of the mean over copies than independent draws have.
    spread = sigma.log().mean(1).var()
    assert spread < 0.3 * sigma.log().flatten().var() / 4


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must be below"):
        NoiseLevels(low=1, high=1)
    with pytest.raises(ValueError, match="must be below"):
        NoiseLevels(low=2, high=-3)
    with pytest.raises(ValueError, match="must be below"):
        NoiseLevels(low=math.nan)
    with pytest.raises(ValueError, match="must be positive"):
        NoiseLevels(std=0)
    with pytest.raises(ValueError, match="must be positive"):
        NoiseLevels(std=math.nan)
