"""Accounting: anchors, bounds on the right side, monotonicity."""

from __future__ import annotations

import math

import pytest
from scipy import optimize, stats

from dpsyngen.privacy.accounting import Mechanism, calibrate_noise, default_delta, epsilon, merge

Q, T, DELTA = 4096 / 60000, 2000, 1e-5


def test_anchor_pld() -> None:
    assert calibrate_noise(1.0, DELTA, sampling_rate=Q, steps=T) == pytest.approx(11.446, abs=0.01)


def test_anchor_beside_a_gaussian_query() -> None:
    noise = calibrate_noise(1.0, DELTA, sampling_rate=Q, steps=T, spent=[Mechanism(1.0, 20.0)])
    assert noise == pytest.approx(11.649, abs=0.01)


def test_rdp_is_a_looser_cross_check() -> None:
    # 12.671 in the literature with other Rényi orders; every choice of orders is at least PLD's noise.
    low, high = (epsilon([Mechanism(Q, noise, T)], DELTA, "rdp") for noise in (12.7, 11.446))
    assert low < 1.0 < high


def gaussian_epsilon(z: float, delta: float) -> float:
    """Balle & Wang 2018, theorem 8: the exact curve of the Gaussian mechanism with sensitivity 1."""

    def gap(e: float) -> float:
        return stats.norm.cdf(0.5 / z - e * z) - math.exp(e) * stats.norm.cdf(-0.5 / z - e * z) - delta

    return float(optimize.brentq(gap, 0, 100))


@pytest.mark.parametrize("noise", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("count", [1, 9])
def test_plain_gaussian_equals_the_closed_form(noise, count) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(count), 1e-5)
    bound = epsilon([Mechanism(1.0, noise, count)], 1e-5)
    assert exact <= bound * (1 + 1e-6)
    assert bound == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    [(10, 0.25, 300, 1e-4), (1, 0.01, 1000, 1e-5), (0.2, 0.02, 200, 1e-6), (100, 0.5, 50, 1e-4), (3, 1.0, 5, 1e-5)],
)
def test_calibrated_noise_never_exceeds_the_target_and_wastes_little(target, rate, steps, delta) -> None:
    noise = calibrate_noise(target, delta, sampling_rate=rate, steps=steps)
    spent = epsilon([Mechanism(rate, noise, steps)], delta)
    assert 0.999 * target <= spent <= target
    assert spent <= epsilon([Mechanism(rate, noise, steps)], delta, "rdp")


def test_noise_is_found_beside_what_renyi_dp_alone_would_refuse() -> None:
    spent = Mechanism(1.0, calibrate_noise(0.95, DELTA, sampling_rate=1.0, steps=1))
    assert epsilon([spent], DELTA, "rdp") > 1
    noise = calibrate_noise(1.0, DELTA, sampling_rate=1.0, steps=1, spent=[spent])
    assert 0.999 < epsilon([spent, Mechanism(1.0, noise)], DELTA) <= 1


def test_monotone() -> None:
    base = epsilon([Mechanism(0.05, 1.0, 100)], DELTA)
    assert epsilon([Mechanism(0.05, 1.0, 101)], DELTA) > base
    assert epsilon([Mechanism(0.05, 1.1, 100)], DELTA) < base
    assert epsilon([Mechanism(0.06, 1.0, 100)], DELTA) > base
    assert epsilon([Mechanism(0.05, 1.0, 100)], DELTA / 10) > base
    assert epsilon([Mechanism(0.05, 1.0, 100), Mechanism(1.0, 10.0)], DELTA) > base


def test_blocks_compose_to_the_whole() -> None:
    whole = epsilon([Mechanism(0.05, 1.0, 100)], DELTA)
    assert epsilon([Mechanism(0.05, 1.0, 40), Mechanism(0.05, 1.0, 60)], DELTA) == whole
    assert merge([Mechanism(0.1, 2, 3), Mechanism(1, 5), Mechanism(0.1, 2, 4)]) == (
        Mechanism(0.1, 2, 7),
        Mechanism(1, 5, 1),
    )


def test_edges() -> None:
    assert epsilon([], DELTA) == 0
    assert math.isinf(epsilon([Mechanism(0.1, 0.0, 5)], DELTA))
    for bad in ((0.0, 1, 1), (1.1, 1, 1), (0.5, -1, 1), (0.5, 1, 0)):
        with pytest.raises(ValueError, match="must be"):
            Mechanism(*bad)
    for delta in (0.0, 1.0):
        with pytest.raises(ValueError, match="must be in"):
            epsilon([Mechanism(0.1, 1.0)], delta)
    with pytest.raises(ValueError, match="already spent"):
        calibrate_noise(0.5, DELTA, sampling_rate=0.1, steps=10, spent=[Mechanism(1.0, 1.0)])
    with pytest.raises(ValueError, match="must be positive"):
        calibrate_noise(-1, DELTA, sampling_rate=0.1, steps=10)


@pytest.mark.parametrize(
    ("records", "delta"),
    [(60_000, 1e-5), (1437, 1e-4), (1000, 1e-4), (999, 1e-3), (162_770, 1e-6), (1, 0.1), (10, 0.01)],
)
def test_default_delta_is_the_largest_power_of_ten_below_one_over_n(records, delta) -> None:
    assert default_delta(records) == pytest.approx(delta)
    assert default_delta(records) < 1 / records


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_gaussian_mechanisms_on_all_records_compose_to_one(kind):
    """Their losses are Gaussians whose means and variances add up: compared with a composition by dp-accounting."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    adjacency = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    direct = PLDAccountant(adjacency) if kind == "pld" else RdpAccountant(neighboring_relation=adjacency)
    for z, count in ((4.0, 1), (3.0, 2), (6.5, 3)):
        direct.compose(dp.GaussianDpEvent(z), count)
    ours = epsilon([Mechanism(1.0, 4.0), Mechanism(1.0, 3.0, 2), Mechanism(1.0, 6.5, 3)], 1e-5, kind)
    assert ours == pytest.approx(direct.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_steps_that_are_computed_once_compose_as_dp_accounting_composes_them(kind):
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    adjacency = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    for count in (1, 30):  # the second time from what was kept of one step
        direct = PLDAccountant(adjacency) if kind == "pld" else RdpAccountant(neighboring_relation=adjacency)
        direct.compose(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(3.0)), count)
        direct.compose(dp.GaussianDpEvent(12.0))
        ours = epsilon([Mechanism(0.02, 3.0, count), Mechanism(1.0, 12.0)], 1e-5, kind)
        assert 0 < ours < 1  # where the grid of losses is dp-accounting's own
        assert ours == pytest.approx(direct.get_epsilon(1e-5), rel=1e-9)


def test_parts_of_a_run_are_bounded_on_its_grid() -> None:
    spent, whole = Mechanism(1.0, 12.0), Mechanism(0.2, 0.7, 40)
    for steps in (2, 20, 40):
        part = [spent, Mechanism(0.2, 0.7, steps)]
        alone = epsilon(part, 1e-5)
        assert alone * (1 - 1e-6) <= epsilon(part, 1e-5, whole=[spent, whole]) <= alone * 1.002
    assert epsilon(part, 1e-5, whole=[spent, whole]) == alone
