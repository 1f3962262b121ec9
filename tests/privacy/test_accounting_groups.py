"""ε for several records of one person: against closed forms, brute force and the general lemma."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import erfc
from scipy.stats import binom, norm

from dpsyngen.privacy.accounting import LARGEST_GROUP, Mechanism, _most_in_a_step, calibrate_noise, epsilon


def gaussian_delta(epsilon_value: float, mu: float) -> float:
    """δ(ε) of the Gaussian mechanism with sensitivity/σ = μ (Balle & Wang 2018, theorem 8)."""
    a = 0.5 * erfc((epsilon_value / mu - mu / 2) / math.sqrt(2))
    b = math.exp(epsilon_value) * 0.5 * erfc((epsilon_value / mu + mu / 2) / math.sqrt(2))
    return a - b


@pytest.mark.parametrize("group", [2, 5, 30])
def test_without_sampling_a_group_is_a_gaussian_of_larger_sensitivity(group) -> None:
    got = epsilon([Mechanism(1.0, 7.0, 4)], 1e-5, group_size=group)
    assert gaussian_delta(got, group * math.sqrt(4) / 7.0) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize(("q", "z", "group"), [(0.2, 1.5, 3), (0.5, 3.0, 8), (0.01, 0.8, 4)])
def test_one_step_against_numerical_integration(q, z, group) -> None:
    """δ(ε) by integrating over the two densities, the group being added and being removed."""
    got = epsilon([Mechanism(q, z, 1)], 1e-6, group_size=group)
    x = np.linspace(-20 * z, group + 20 * z, 400_001)
    without = norm.pdf(x, 0, z)
    j = np.arange(group + 1)
    with_group = sum(p * norm.pdf(x, k, z) for k, p in zip(j, binom.pmf(j, group, q), strict=True))
    step = x[1] - x[0]
    deltas = [
        np.maximum(p - math.exp(got) * r, 0).sum() * step for p, r in ((with_group, without), (without, with_group))
    ]
    assert max(deltas) == pytest.approx(1e-6, rel=0.02)


@pytest.mark.parametrize(("q", "z", "steps"), [(0.05, 2.0, 200), (0.3, 6.0, 4)])
def test_groups_cost_more_than_their_members_and_less_than_the_lemma(q, z, steps) -> None:
    m = [Mechanism(q, z, steps)]
    by_pld = [epsilon(m, 1e-5, group_size=g) for g in (1, 2, 4)]
    assert by_pld == sorted(by_pld)
    assert by_pld[1] > 2 * by_pld[0]
    for g, value in zip((2, 4), by_pld[1:], strict=True):
        assert value <= epsilon(m, 1e-5, "rdp", group_size=g)


def test_a_group_of_one_is_a_record() -> None:
    m = [Mechanism(0.1, 1.0, 100), Mechanism(1.0, 9.0, 2)]
    for kind in ("pld", "rdp"):
        assert epsilon(m, 1e-5, kind, group_size=1) == epsilon(m, 1e-5, kind)  # type: ignore[arg-type]


def test_the_lemma_is_met_by_what_it_returns() -> None:
    """ε for g = 3 by the lemma: three times an ε' whose δ' is small enough."""
    m, g, delta = [Mechanism(0.1, 3.0, 100)], 3, 1e-5
    got = epsilon(m, delta, "rdp", group_size=g)
    low, high = -60.0, math.log(delta)
    for _ in range(60):  # the δ' at which RDP gives ε' = got/3
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(m, math.exp(middle), "rdp") <= got / g else (middle, high)
    one = got / g
    assert math.exp(low) * math.expm1(g * one) / math.expm1(one) <= delta * 1.001


def test_calibration_for_a_group() -> None:
    z = calibrate_noise(2.0, 1e-5, sampling_rate=0.05, steps=100, group_size=3)
    spent = epsilon([Mechanism(0.05, z, 100)], 1e-5, group_size=3)
    assert 2.0 * (1 - 1e-3) <= spent <= 2.0
    assert z > calibrate_noise(2.0, 1e-5, sampling_rate=0.05, steps=100)


@pytest.mark.parametrize(("q", "steps", "group"), [(0.001, 10, 4), (0.001, 1000, 16), (0.05, 10, 16), (0.05, 1000, 16)])
def test_what_is_cut_from_the_group_in_all_steps_is_within_eta(q, steps, group) -> None:
    """By sums of binomials: each step of each of three mechanisms may be the one that more of the group are in."""

    def cut(most: int) -> float:
        return sum(math.comb(group, i) * q**i * (1 - q) ** (group - i) for i in range(most + 1, group + 1))

    most, delta = _most_in_a_step(Mechanism(q, 1.0, steps), 1e-5, 3, group), 1e-5
    assert 3 * steps * cut(most) <= 1e-6 * delta < 3 * steps * cut(most - 1)


@pytest.mark.parametrize("group", [0, -1, 1.5, True, LARGEST_GROUP + 1])
def test_group_sizes_that_are_none(group) -> None:
    with pytest.raises(ValueError, match="group_size"):
        epsilon([Mechanism(0.1, 1.0)], 1e-5, group_size=group)


def test_the_largest_group_is_computed() -> None:
    assert math.isfinite(epsilon([Mechanism(1e-4, 4.0, 10)], 1e-5, group_size=LARGEST_GROUP))
