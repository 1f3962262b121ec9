"""The one-run bound: the figures of the paper, closed forms, and coverage on mechanisms whose ε is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom

from dpsyngen.audit.one_run import OneRun, guess, one_run_epsilon, one_run_p_value, plan_guesses
from dpsyngen.privacy.accounting import Mechanism, epsilon


@pytest.mark.parametrize(
    ("correct", "guesses", "canaries", "delta", "published"),
    [
        # arXiv 2305.08846, appendix D and section 7, at confidence 0.95.
        (75, 100, 100, 0.0, 0.702),
        (75, 100, 100, 1e-4, 0.699),
        (75, 100, 1000, 1e-4, 0.673),
        (1439, 1510, 100_000, 1e-5, 2.675),
    ],
)
def test_published_figures(correct, guesses, canaries, delta, published) -> None:
    assert one_run_epsilon(correct, guesses, canaries, delta, 0.95) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("m", "confidence"), [(10, 0.95), (100, 0.99), (1000, 0.999)])
def test_perfect_guesses(m, confidence) -> None:
    """Under ε all m are right with probability p^m, p = e^ε/(1 + e^ε)."""
    p = (1 - confidence) ** (1 / m)
    assert one_run_epsilon(m, m, m, 0.0, confidence) == pytest.approx(math.log(p / (1 - p)), abs=1e-5)


def test_guessing_like_a_coin_shows_nothing() -> None:
    assert one_run_epsilon(50, 100, 100, 0.0, 0.95) == 0.0
    assert one_run_epsilon(0, 0, 100, 1e-5, 0.95) == 0.0


def test_monotonic() -> None:
    def bound(v=80, r=100, m=200, delta=1e-5, confidence=0.95) -> float:
        return one_run_epsilon(v, r, m, delta, confidence)

    assert bound(v=85) > bound() > bound(v=75) > 0
    assert bound(delta=1e-6) > bound() > bound(delta=1e-3)
    assert bound(m=100) > bound() > bound(m=5000)
    assert bound(confidence=0.9) > bound() > bound(confidence=0.999)
    values = [one_run_p_value(80, 100, 200, e, 1e-5) for e in np.linspace(0, 4, 30)]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


def randomised_response(rng: np.random.Generator, m: int, eps: float, shown: float) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and what is released of each: the truth with probability e^ε/(1 + e^ε); always the truth if shown.

    Returns:
        coins [m] booleans and scores [m]: large where the coin was shown.
    """
    coins = rng.random(m) < 0.5
    truthful = rng.random(m) < 1 / (1 + math.exp(-eps))
    exposed = rng.random(m) < shown
    answer = np.where(truthful | exposed, coins, ~coins)
    return coins, np.where(answer, 1.0, -1.0) * np.where(exposed, 2.0, 1.0) + 1e-6 * rng.random(m)


@pytest.mark.parametrize(("eps", "shown"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.02)])
def test_coverage_on_randomised_response(eps, shown) -> None:
    """(ε, δ)-DP with δ = `shown`: the bound exceeds ε no more often than 1 - confidence."""
    rng = np.random.default_rng(11)
    runs, m, confidence = 1500, 60, 0.9
    bounds = []
    for _ in range(runs):
        coins, scores = randomised_response(rng, m, eps, shown)
        correct = int((guess(scores, m) == np.where(coins, 1, -1)).sum())
        bounds.append(one_run_p_value(correct, m, m, eps, shown) <= 1 - confidence)
    assert sum(bounds) <= binom.isf(1e-4, runs, 1 - confidence)


def test_without_its_delta_the_bound_would_be_wrong() -> None:
    """Guessing only where coins are shown: all guesses are right although ε is 0.5; δ has to account for it."""
    rng = np.random.default_rng(12)
    exceeded = {0.0: 0, 0.05: 0}
    for _ in range(200):
        coins, scores = randomised_response(rng, 100, 0.5, 0.05)
        for delta in exceeded:
            correct = int((guess(scores, 6) == np.where(coins, 1, -1)).sum())
            exceeded[delta] += one_run_p_value(correct, 6, 100, 0.5, delta) <= 0.1
    assert exceeded[0.0] > 60
    assert exceeded[0.05] <= binom.isf(1e-4, 200, 0.1)


def test_gaussian_mechanism_with_many_canaries() -> None:
    """T subsampled steps; the number of guesses comes from a simulation, and the bound is a fair part of ε."""
    q, z, steps, m, delta = 0.5, 1.5, 20, 2000, 1e-6
    eps = epsilon([Mechanism(q, z, steps)], delta)
    guesses = plan_guesses(m, delta, 0.99, sampling_rate=q, noise_multiplier=z, steps=steps, simulations=5)
    assert guesses % 2 == 0
    assert 0 < guesses <= m
    rng = np.random.default_rng(5)
    found = []
    for _ in range(30):
        inside = rng.random(m) < 0.5
        scores = inside * rng.binomial(steps, q, m) + z * math.sqrt(steps) * rng.standard_normal(m)
        found.append(OneRun(scores, inside, guesses, delta=delta, epsilon_claimed=eps, confidence=0.99))
    assert all(f.epsilon_lower <= eps for f in found)
    assert all(f.p_value > 0.5 for f in found)
    assert np.mean([f.epsilon_lower for f in found]) > 0.2 * eps
    # A quarter of the noise is far more than the claimed ε allows.
    scores = inside * rng.binomial(steps, q, m) + z / 6 * math.sqrt(steps) * rng.standard_normal(m)
    assert OneRun(scores, inside, guesses, delta=delta, epsilon_claimed=2.0, confidence=0.99).p_value < 1e-3


def test_guesses_are_of_both_kinds_and_the_rest_abstains() -> None:
    assert guess(np.array([3.0, -1.0, 0.0, 7.0, 2.0]), 2).tolist() == [0, -1, 0, 1, 0]
    assert not guess(np.arange(4.0), 0).any()
    for wrong in (3, 6, -2):
        with pytest.raises(ValueError, match="guesses"):
            guess(np.arange(5.0), wrong)
    for arguments in ((3, 2, 5, 1.0, 0.0), (1, 6, 5, 1.0, 0.0), (1, 2, 5, -1.0, 0.0), (1, 2, 5, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"need|must be"):
            one_run_p_value(*arguments)
