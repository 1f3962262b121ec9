"""Tests of Poisson sampling: their p-values are right for it, and small for what is not."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from dpsyngen.audit.invariants import _dispersion, check_batches, check_sizes
from dpsyngen.privacy.randomness import Randomness, poisson_sample

SIZES, RECORDS = (
    "batch sizes vary as Poisson sampling says",
    "how often a record is used varies as Poisson sampling says",
)


def by_name(findings) -> dict[str, float]:
    return {f.name: f.p_value for f in findings}


@pytest.mark.parametrize(("trials", "rate", "values"), [(4, 0.3, [1, 1, 1]), (5, 0.5, [0, 5, 2]), (3, 0.1, [0, 0, 1])])
def test_dispersion_by_enumeration(trials, rate, values) -> None:
    centre = round(trials * rate)
    cost = sum((v - centre) ** 2 for v in values)
    lower = upper = 0.0
    for outcome in product(range(trials + 1), repeat=len(values)):
        p = float(np.prod(binom.pmf(outcome, trials, rate)))
        of_this = sum((v - centre) ** 2 for v in outcome)
        lower, upper = lower + p * (of_this <= cost), upper + p * (of_this >= cost)
    assert _dispersion(np.array(values), trials, rate)[1] == pytest.approx(min(1.0, 2 * min(lower, upper)), abs=1e-9)


@pytest.mark.parametrize(("records", "rate", "steps"), [(80, 0.4, 15), (50, 0.02, 30)])
def test_p_values_of_poisson_sampling_are_valid(records, rate, steps) -> None:
    """The share below 0.1 is at most 0.1, for each test, up to 4 standard errors of 400 runs."""
    small: dict[str, int] = {}
    for seed in range(400):
        key = Randomness.from_insecure_seed(seed)
        batches = [poisson_sample(key, t, records, rate) for t in range(steps)]
        for name, p in by_name(check_batches(batches, records, rate)).items():
            small[name] = small.get(name, 0) + (p < 0.1)
    assert len(small) == 6
    assert max(small.values()) <= 400 * 0.1 + 4 * np.sqrt(400 * 0.09), small


def test_shuffled_batches_vary_too_little_and_avoid_each_other() -> None:
    rng = np.random.default_rng(0)
    batches = [b for _ in range(10) for b in np.split(rng.permutation(120), 4)]
    p = by_name(check_batches(batches, 120, 0.25))
    assert p["records are included at the claimed rate"] == 1.0
    assert p[SIZES] < 1e-9
    assert p[RECORDS] < 1e-9
    assert p["successive batches are independent"] < 1e-9


def test_wrong_rates_repeats_and_missing_empties() -> None:
    rng = np.random.default_rng(1)
    draw = [np.flatnonzero(rng.random(200) < 0.13) for _ in range(40)]
    assert by_name(check_batches(draw, 200, 0.1))["records are included at the claimed rate"] < 1e-9
    assert by_name(check_batches([*draw[:39], draw[3]], 200, 0.13))["no batch repeats an earlier one"] < 1e-9
    sizes = np.array([max(1, s) for s in rng.binomial(50, 0.02, 40)])
    assert by_name(check_sizes(sizes, 50, 0.02))["empty batches occur and are steps"] < 1e-6


def test_rate_one_and_few_steps() -> None:
    whole = [np.arange(30)] * 3
    assert all(f.p_value == 1.0 for f in check_batches(whole, 30, 1.0))
    assert all(f.p_value > 0.01 for f in check_batches([np.arange(15)], 30, 0.5))


def test_large_runs_are_quick_and_exact_enough() -> None:
    rng = np.random.default_rng(2)
    p = by_name(check_sizes(rng.binomial(60_000, 512 / 60_000, 450), 60_000, 512 / 60_000))
    assert min(p.values()) > 1e-4
    fixed = by_name(check_sizes(np.full(450, 512), 60_000, 512 / 60_000))
    assert fixed[SIZES] < 1e-9
