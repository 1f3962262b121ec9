"""The accountant over a grid of settings: always an upper bound, calibration always on the safe side."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize
from scipy.special import log_ndtr

from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import Mechanism, _refine, calibrate_noise, epsilon, epsilon_bound, merge


def gaussian_epsilon(z: float, delta: float) -> float:
    """Balle & Wang 2018, theorem 8, in logarithms so that a tiny δ keeps its digits."""

    def gap(e: float) -> float:
        return math.exp(log_ndtr(0.5 / z - e * z)) - math.exp(e + log_ndtr(-0.5 / z - e * z)) - delta

    return float(optimize.brentq(gap, 0, 200))


@pytest.mark.parametrize("delta", [1e-3, 1e-8, 1e-12, 1e-14])
@pytest.mark.parametrize("count", [1, 400])
def test_tiny_delta_is_still_an_upper_bound(delta, count) -> None:
    exact = gaussian_epsilon(2.0, delta)
    bound = epsilon([Mechanism(1.0, 2.0 * math.sqrt(count), count)], delta)
    assert exact * (1 - 1e-6) <= bound <= exact * 1.01


@pytest.mark.parametrize(("q", "z", "delta"), [(0.1, 0.6, 1e-2), (0.5, 1.0, 1e-5), (0.02, 0.4, 1e-5), (0.9, 3.0, 1e-5)])
def test_one_subsampled_step_equals_numerical_integration(q, z, delta) -> None:
    """Both directions of add/remove, from the densities, with no accountant in between."""

    def density(x: float, mean: float) -> float:
        return math.exp(-(((x - mean) / z) ** 2) / 2) / (z * math.sqrt(2 * math.pi))

    def without(x: float) -> float:
        return density(x, 0)

    def with_it(x: float) -> float:
        return (1 - q) * without(x) + q * density(x, 1)

    def needed(e: float, p, r) -> float:
        return integrate.quad(lambda x: max(p(x) - math.exp(e) * r(x), 0.0), -12 * z, 1 + 12 * z, limit=400)[0]

    def gap(e: float) -> float:
        return max(needed(e, with_it, without), needed(e, without, with_it)) - delta

    exact = 0.0 if gap(0) <= 0 else float(optimize.brentq(gap, 0, 60, xtol=1e-5))
    bound = epsilon([Mechanism(q, z)], delta)
    assert exact - 2e-3 <= bound <= exact + 0.01 * exact + 2e-3


@settings(max_examples=6)
@given(
    q=st.floats(0.005, 1.0),
    z=st.floats(0.5, 20.0),
    steps=st.integers(1, 3000),
    delta=st.sampled_from([1e-4, 1e-6]),
)
def test_pld_is_never_looser_than_rdp_nor_below_one_step(q, z, steps, delta) -> None:
    pld = epsilon([Mechanism(q, z, steps)], delta)
    assert 0 <= pld <= epsilon([Mechanism(q, z, steps)], delta, "rdp") * (1 + 1e-3) + 1e-3
    assert pld >= epsilon([Mechanism(q, z, 1)], delta) * (1 - 1e-3) - 1e-3


@pytest.mark.parametrize(
    ("q", "z", "steps"), [(0.2, 0.7, 6), (0.004, 0.7, 160), (0.02, 20.0, 4000), (0.5, 0.3, 10), (1.0, 9.0, 1)]
)
def test_the_orders_that_a_search_begins_with_give_a_bound_that_is_near(q, z, steps) -> None:
    part = (Mechanism(q, z, steps),)
    by_all, by_few = (accounting._rdp_epsilon(part, 1e-5, 1, orders) for orders in (None, accounting._ROUGH_ORDERS))
    assert by_all * (1 - 1e-9) <= by_few <= 1.1 * by_all


@settings(max_examples=6)
@given(
    target=st.floats(0.1, 20.0),
    steps=st.integers(1, 3000),
    delta=st.sampled_from([1e-4, 1e-6]),
)
def test_calibrated_noise_never_exceeds_the_target(target, steps, delta) -> None:
    q = 1.0  # where an evaluation takes milliseconds; test_accounting has lower rates
    noise = calibrate_noise(target, delta, sampling_rate=q, steps=steps)
    assert epsilon([Mechanism(q, noise, steps)], delta) <= target
    # A little less noise would not do: the calibration wastes nothing.
    assert epsilon([Mechanism(q, noise * 0.995, steps)], delta) > target


def test_calibration_where_delta_alone_pays() -> None:
    """ε falls to 0 at a finite noise when δ is large; the search must not trip over its logarithm."""
    for edge, start in itertools.product((0.7, 5.0, 300.0), (0.1, 1.0, 50.0)):

        def cost(z: float, edge: float = edge) -> float:
            return math.inf if z < edge / 3 else 0.0 if z >= edge else 20 * (edge - z) ** 0.25

        noise = _refine(cost, 0.01, start, 3e-4)
        assert cost(noise) <= 0.01
        assert cost(noise * 0.99) > 0.01


def test_calibration_includes_what_was_spent() -> None:
    spent = (Mechanism(1.0, 8.0), Mechanism(1.0, 9.0, 2))
    alone = calibrate_noise(2.0, 1e-5, sampling_rate=1.0, steps=10)
    beside = calibrate_noise(2.0, 1e-5, sampling_rate=1.0, steps=10, spent=spent)
    assert beside > alone
    assert 1.99 < epsilon([*spent, Mechanism(1.0, beside, 10)], 1e-5) <= 2.0


def test_subsampling_amplifies_and_rate_one_is_the_plain_gaussian() -> None:
    plain = epsilon([Mechanism(1.0, 2.0, 10)], 1e-5)
    almost = epsilon([Mechanism(1 - 1e-9, 2.0, 10)], 1e-5)
    assert almost == pytest.approx(plain, rel=1e-3)
    assert epsilon([Mechanism(0.5, 2.0, 10)], 1e-5) < plain


def test_order_and_grouping_do_not_matter() -> None:
    a, b = Mechanism(0.1, 2.0, 3), Mechanism(1.0, 9.0)
    assert epsilon([a, b], 1e-5) == epsilon([b, a], 1e-5) == epsilon([Mechanism(0.1, 2.0)] * 3 + [b], 1e-5)
    assert sum(m.count for m in merge([a, b, a])) == 7
    # Mechanisms that differ in the last digit are not lumped together.
    assert len(merge([a, Mechanism(0.1, math.nextafter(2.0, 3.0), 3)])) == 2


def test_one_step_without_noise_spoils_everything() -> None:
    for kind in ("pld", "rdp"):
        assert math.isinf(epsilon([Mechanism(0.1, 5.0, 100), Mechanism(1e-6, 0.0)], 1e-5, kind))


# ------------------------------------------------------------------------------------- what an evaluation may cost


@pytest.fixture
def afresh():
    yield accounting._bound.cache_clear
    accounting._bound.cache_clear()


@pytest.mark.parametrize(("mechanism", "group"), [(Mechanism(0.05, 1.0, 100), 1), (Mechanism(0.2, 1.5, 20), 3)])
def test_a_coarser_grid_is_never_below_a_finer_one_and_says_so(monkeypatch, afresh, mechanism, group) -> None:
    found = []
    for most in (1 << 22, 1 << 14, 1 << 12):
        monkeypatch.setattr(accounting, "_MOST_POINTS", most)
        afresh()
        found.append(epsilon_bound([mechanism], 1e-5, group))
    values = [b.epsilon for b in found]
    assert values == sorted(values)
    assert values[-1] <= values[0] * 1.1
    assert "coarser" not in found[0].by
    assert all("times coarser than usual to save memory" in b.by for b in found[1:])


def test_a_composition_that_grows_too_long_gets_a_coarser_grid(monkeypatch, afresh) -> None:
    m = [Mechanism(0.1, 1.0, 300), Mechanism(0.2, 3.0, 200)]
    fine = epsilon_bound(m, 1e-5)
    monkeypatch.setattr(accounting, "_MOST_LOSSES", 100_000)
    afresh()
    coarse = epsilon_bound(m, 1e-5)
    assert fine.epsilon < coarse.epsilon <= fine.epsilon * 1.05
    assert "times coarser" in coarse.by


def test_the_smallest_of_all_bounds_counts(monkeypatch, afresh) -> None:
    sampled, whole = Mechanism(0.01, 1.0, 100), Mechanism(1.0, 1e-3)
    quick, other = (accounting._quick_bound((m,), 1e-5, 1, "") for m in (sampled, whole))
    assert quick.epsilon == epsilon([sampled], 1e-5, "rdp") < 2
    assert other.epsilon == pytest.approx(1e6 / 2 + 1e3 * 4.26489, rel=1e-6)  # μ²/2 + μ·z of μ = 1000 and δ
    assert other.epsilon < epsilon([whole], 1e-5, "rdp")
    monkeypatch.setattr(accounting, "_MOST_POINTS", 300)  # so coarse a grid loses more than it gains
    afresh()
    assert epsilon_bound([sampled], 1e-5).epsilon == quick.epsilon


@pytest.mark.parametrize("points", [1 << 22, 200])
def test_the_closed_form_is_below_every_way_of_computing(monkeypatch, afresh, points) -> None:
    monkeypatch.setattr(accounting, "_MOST_POINTS", points)
    afresh()
    for z, delta in ((0.5, 1e-5), (2.0, 1e-8), (0.1, 1e-3)):
        exact = gaussian_epsilon(z, delta)
        assert exact * (1 - 1e-6) <= epsilon([Mechanism(1.0, z)], delta) <= 1.5 * exact
        quick = accounting._quick_bound((Mechanism(1.0, 5 * z, 25),), delta, 1, "")
        assert exact * (1 - 1e-6) <= quick.epsilon


@pytest.mark.parametrize(
    ("q", "z", "steps", "delta", "group"),
    [
        (0.0085, 0.003, 300, 1e-5, 1),
        (0.0085, 1e-6, 300, 1e-5, 1000),
        (1.0, 1e-5, 1, 1e-5, 1),
        (0.5, 1.0, 10**7, 1e-5, 1),
        (0.5, 1.0, 400, 1e-5, 1000),
        (0.0085, 1.0, 10**21, 1e-5, 1),
        (0.0085, 1.0, 400, 1e-300, 1),
        (1e-7, 1e6, 10**7, 1e-8, 1),
        (0.5, 1e300, 400, 1e-5, 3),
        (1.0, 1e300, 400, 1e-5, 1),
    ],
)
def test_extreme_figures_have_a_bound(q, z, steps, delta, group) -> None:
    bound = epsilon_bound([Mechanism(q, z, steps)], delta, group)
    assert 0 <= bound.epsilon < math.inf
    assert bound.epsilon == epsilon([Mechanism(q, z, steps)], delta, group_size=group)
    # Without sampling it is the Gaussian mechanism with μ = g √steps / z, which sampling can only lower.
    mu = group * math.sqrt(steps) / z
    assert bound.epsilon <= mu**2 / 2 + mu * 40


def test_noise_that_is_none_and_nothing_at_all() -> None:
    assert epsilon_bound([], 1e-5).epsilon == 0
    for z in (1e-7, 1e-300):
        assert math.isinf(epsilon_bound([Mechanism(1.0, z, 3), Mechanism(0.1, 1.0)], 1e-5).epsilon)
        assert math.isinf(epsilon([Mechanism(1.0, z, 3)], 1e-5, "rdp", 4))
