"""The mechanism in whole numbers: law of the noise, sensitivity proven with integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.clipping import GridGradient, clip_and_sum, clip_to_grid, default_grid
from dpsyngen.privacy.exact import DiscreteGaussian, discrete_gaussian
from dpsyngen.privacy.noise import GaussianMechanism
from dpsyngen.privacy.randomness import Randomness

KEY = Randomness.from_insecure_seed(7)
GRID = 2.0**-12


@pytest.mark.parametrize("sigma", [1, 2, 3, 5, 17])
def test_noise_has_exactly_the_probabilities_of_its_definition(sigma) -> None:
    n = 200_000
    values = discrete_gaussian(KEY, sigma, n, sigma)
    reach = 4 * sigma
    support = np.arange(-60 * sigma, 60 * sigma + 1)
    weights = np.exp(-(support.astype(float) ** 2) / (2 * sigma**2))
    probabilities = weights / weights.sum()
    inside = np.abs(support) <= reach
    expected = np.append(probabilities[inside], probabilities[~inside].sum()) * n
    observed = [(values == v).sum() for v in support[inside]] + [(np.abs(values) > reach).sum()]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [1000, 2**20, 2**30, 2**40])
def test_fine_noise_is_gaussian(sigma) -> None:
    n = 100_000
    values = discrete_gaussian(KEY, 0, n, sigma) / sigma
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert values.var() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
    assert abs(values.mean()) < 5 / math.sqrt(n)
    expected = n * 2 * stats.norm.sf(3.5)
    assert abs((np.abs(values) > 3.5).sum() - expected) < 6 * math.sqrt(expected)


def test_noise_is_a_function_of_the_step_and_differs_between_steps() -> None:
    a, b = discrete_gaussian(KEY, 3, 5000, 1 << 20), discrete_gaussian(KEY, 3, 5000, 1 << 20)
    c = discrete_gaussian(KEY, 4, 5000, 1 << 20)
    assert np.array_equal(a, b)
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.08
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.08
    for bad in (0, -1, 1 << 41):
        with pytest.raises(ValueError, match="whole number"):
            discrete_gaussian(KEY, 0, 1, bad)


def gradients(seed: int, examples: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(examples, 7, 3), (examples, 11)]
    return [torch.randn(s, generator=generator) * scale for s in shapes]


def integer_norm(a: list[torch.Tensor], b: list[torch.Tensor]) -> int:
    """Squared distance, as a Python integer."""
    return sum(int(d) ** 2 for x, y in zip(a, b, strict=True) for d in (x - y).flatten())


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("norm", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("grid", [GRID, 2.0**-28])
def test_removing_an_example_moves_the_integers_by_at_most_the_sensitivity(scale, norm, grid) -> None:
    given = gradients(1, 6, scale)
    given[0][2, 1, 1] = float("nan")
    whole = clip_to_grid([g.clone() for g in given], norm, grid)
    assert whole.l2_sensitivity == math.floor(norm / grid)
    assert whole.not_finite == 1
    for out in range(6):
        keep = [i for i in range(6) if i != out]
        rest = clip_to_grid([g[keep].clone() for g in given], norm, grid)
        squared = integer_norm(whole.sums, rest.sums)
        assert squared <= whole.l2_sensitivity**2
        if out == 2:
            assert squared == 0


def test_gradient_of_exactly_c_keeps_its_length() -> None:
    given = [torch.zeros(1, 4)]
    given[0][0, 2] = 1.0
    clipped = clip_to_grid(given, 1.0, GRID)
    # The float clipping may take a few units in the last place off, so one step of the grid at most.
    assert 4095 <= int(clipped.sums[0][2]) <= 4096


def test_sums_are_those_of_the_floating_mechanism_up_to_the_grid_and_exact_in_any_order() -> None:
    given = gradients(2, 9, 2.0)
    exact = clip_to_grid([g.clone() for g in given], 1.0, GRID)
    floating = clip_and_sum([g.double() for g in given], 1.0)
    for a, b in zip(exact.sums, floating.sums, strict=True):
        assert ((a * GRID - b).abs() <= 9 * GRID).all()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    parts = [clip_to_grid([g[order[i : i + 4]].clone() for g in given], 1.0, GRID) for i in (0, 4, 8)]
    again = parts[2] + parts[0] + parts[1]
    assert all(torch.equal(a, b) for a, b in zip(exact.sums, again.sums, strict=True))
    assert again.examples == 9


def test_default_grid_loses_less_than_a_thousandth() -> None:
    for norm, parameters in ((1.0, 114_660), (0.3, 2_000_000)):
        grid = default_grid(norm, parameters)
        assert math.frexp(grid)[0] == 0.5
        assert grid * math.sqrt(parameters) <= 1e-3 * norm < 2 * grid * math.sqrt(parameters)


def test_bad_grids_are_refused() -> None:
    one = [torch.ones(1, 3)]
    for grid, message in ((0.3, "power of two"), (0.0, "power of two"), (4.0, "finer"), (2.0**-40, "coarser")):
        with pytest.raises(ConfigError, match=message):
            clip_to_grid(one, 1.0, grid)
    with pytest.raises(ConfigError, match="coarser"):
        clip_to_grid(one, 2.0**31, 1.0)  # squares of larger numbers would not fit
    a, b = (clip_to_grid(one, 1.0, g) for g in (GRID, GRID / 2))
    with pytest.raises(ValueError, match="cannot be added"):
        a + b
    with pytest.raises(ConfigError, match="finer grid"):
        DiscreteGaussian(0.1, 1.0).release(a, KEY, step=0)
    with pytest.raises(ValueError, match="whole numbers"):
        GaussianMechanism(1.0, 1.0).release(a, KEY, step=0)
    for bad in (
        {"noise_multiplier": 0.0, "expected_examples": 1.0},
        {"noise_multiplier": 1.0, "expected_examples": 0.0},
    ):
        with pytest.raises(ValueError, match="must be positive"):
            DiscreteGaussian(**bad)


@pytest.mark.parametrize("examples", [0, 3])
def test_mean_and_deviation_of_the_release(examples) -> None:
    parameters = [torch.zeros(300, 100), torch.zeros(20)]
    clipped = clip_to_grid([p.new_zeros(0, *p.shape) for p in parameters], 2.0, GRID)
    assert clipped.examples == 0
    if examples:
        sums = [torch.full_like(s, 1 << 14) for s in clipped.sums]  # 4.0
        clipped = GridGradient(sums, clipped.l2_sensitivity, examples, torch.zeros(examples), 0, GRID)
    out = DiscreteGaussian(3.0, 8.0).release(clipped, KEY, step=1)
    assert [o.shape for o in out] == [p.shape for p in parameters]
    values = torch.cat([o.flatten() for o in out]).double()
    n = len(values)
    assert values.std() == pytest.approx(3.0 * 2.0 / 8.0, rel=5 / math.sqrt(2 * n))
    assert values.mean() == pytest.approx((4.0 if examples else 0.0) / 8.0, abs=5 * 0.75 / math.sqrt(n))
