"""Thresholds on curves whose elbow is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpsyngen.thresholds.gap import METHODS, SIDES, find_elbow, log_sigma_grid
from tests.thresholds.toys import ExactMixture, gaussian_gap, gaussian_loss

U = np.array(log_sigma_grid())
NONE = np.empty((0, len(U)))


def power_law(u: np.ndarray) -> np.ndarray:
    """A gap that rises as σ² to 1 at log σ = 0 and falls as σ⁻² after it."""
    return np.exp(-2 * np.abs(u))


def test_tolerance_on_a_power_law_is_exact() -> None:
    for tolerance in (0.01, 0.05, 0.3):
        wanted = math.log(tolerance) / 2
        for side, sign in (("cleaning", 1), ("coarse", -1)):
            elbow = find_elbow(U, power_law(U), NONE, side, "tolerance", tolerance)
            assert elbow.log_sigma == pytest.approx(sign * wanted, abs=0.02)
            assert elbow.value == tolerance
            assert (elbow.reason, elbow.found) == ("", 1.0)


def test_tolerance_on_gaussians_is_where_the_closed_form_says() -> None:
    a, b = ExactMixture.gaussian([0.0], [[0.3]]), ExactMixture.gaussian([0.0], [[0.1]])

    def relative(u: float) -> float:
        return gaussian_gap(a, b, math.exp(u)) / gaussian_loss(a, math.exp(u))

    curve = np.array([relative(u) for u in U])
    for side in SIDES:
        elbow = find_elbow(U, curve, NONE, side, "tolerance", 0.02)
        assert relative(elbow.log_sigma) == pytest.approx(0.02, rel=0.1)
    fine = np.linspace(-6, 0, 60_001)
    exact = fine[np.argmax([relative(u) > 0.02 for u in fine[::100]]) * 100]
    assert find_elbow(U, curve, NONE, "cleaning", "tolerance", 0.02).log_sigma == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize(
    ("curve", "side", "method", "reason"),
    [
        (0.5 + 0 * U, "coarse", "tolerance", "50 % at this end already, above 5 %"),
        (0.2 + np.maximum(U, 0), "coarse", "tolerance", "at this end already"),
        (0.01 + 0.001 * U**2, "cleaning", "tolerance", "within 5 % everywhere"),
        (0.01 + 0.001 * U**2, "cleaning", "loss", "excess of the loss is within"),
    ],
)
def test_it_says_so_where_there_is_no_stage(curve, side, method, reason) -> None:
    elbow = find_elbow(U, curve, np.stack([curve] * 3), side, method, 0.05)
    assert elbow.log_sigma is None
    assert elbow.value is None
    assert (elbow.low, elbow.high, elbow.found) == (None, None, 0)
    assert reason in elbow.reason


def test_a_stage_ends_at_the_first_level_that_exceeds_the_tolerance() -> None:
    """A dip further on is no part of it: programs must be good at *every* level that they own."""
    curve = power_law(U)
    curve[5] = 0.2  # a bump at log σ = -3.7, in a region of 6e-4
    elbow = find_elbow(U, curve, NONE, "cleaning", "tolerance", 0.05)
    assert U[4] < elbow.log_sigma < U[5]


def test_excess_may_be_negative() -> None:
    curve = np.interp(U, [-2, 0, 2], [-0.1, 0.9, -0.1])
    elbow = find_elbow(U, curve, NONE, "cleaning", "loss", 0.05)
    assert elbow.log_sigma == pytest.approx(-1.7, abs=0.02)
    assert find_elbow(U, curve, NONE, "coarse", "loss", 0.05).log_sigma == pytest.approx(1.7, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_interval_holds_the_truth_and_shrinks_with_the_noise(method) -> None:
    rng = np.random.default_rng(0)
    curve = np.interp(U, [-3, 0, 3], [0, 1, 0]) + 0.01
    widths = []
    for noise in (0.2, 0.02):
        drawn = curve * np.exp(noise * rng.standard_normal((400, len(U))))
        elbow = find_elbow(U, curve, drawn, "cleaning", method, 0.05)
        assert elbow.low <= elbow.log_sigma <= elbow.high
        assert elbow.found > 0.9
        widths.append(elbow.high - elbow.low)
    assert widths[1] < widths[0] / 2


def test_share_of_the_draws_that_have_a_stage() -> None:
    with_one, without = power_law(U), 0.5 + 0 * U
    elbow = find_elbow(U, with_one, np.stack([with_one, without, with_one, with_one]), "cleaning", "tolerance", 0.05)
    assert elbow.found == 0.75
    assert elbow.low == pytest.approx(elbow.high)
