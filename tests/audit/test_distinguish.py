"""The step-level game: it accepts the mechanism at the stated rate, and a tenth less noise does not get through."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from dpsyngen.audit.distinguish import StepGame, play_step_game
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.clipping import ClippingStyle
from dpsyngen.privacy.exact import DiscreteGaussian
from dpsyngen.privacy.noise import GaussianMechanism
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness

C, EXPECTED = 0.7, 5.0


def play(z: float, actual: float, *, style: ClippingStyle = "flat", discrete: bool = False, **settings) -> StepGame:
    """The game on the engine and the mechanism, with noise `actual` times what is claimed."""
    key = Randomness.from_system()
    mechanism = (DiscreteGaussian if discrete else GaussianMechanism)(z * actual, EXPECTED)

    def summed(module: nn.Module, loss: Callable[[slice], Tensor], examples: int):
        return mechanism.sum(PerExampleGradients(module, C, style=style, workers=1), loss, examples)

    def released(total, step: int) -> list[Tensor]:
        return mechanism.release(total, key, step)

    return play_step_game(summed, released, clipping_norm=C, noise_multiplier=z, expected_examples=EXPECTED, **settings)


def play_with(normals: np.random.Generator, z: float, actual: float, trials: int, confidence: float) -> StepGame:
    """The same with a fast generator in place of the mechanism, for many games."""

    def released(total, step: int) -> list[Tensor]:
        return [
            (s + torch.from_numpy(z * actual * C * normals.standard_normal(s.shape))) / EXPECTED for s in total.sums
        ]

    return play_step_game(
        lambda module, loss, examples: PerExampleGradients(module, C, workers=1).sum(loss, examples),
        released,
        clipping_norm=C,
        noise_multiplier=z,
        expected_examples=EXPECTED,
        trials=trials,
        slots=8,
        confidence=confidence,
    )


@pytest.mark.parametrize(
    ("z", "style", "group", "slots"),
    [(0.5, "flat", 1, 1), (1.0, "per-layer", 1, 8), (4.2, "flat", 5, 8)],
)
def test_a_tenth_less_noise_is_caught_and_the_claimed_noise_is_not(z, style, group, slots) -> None:
    right, wrong = (play(z, actual, style=style, trials=10_000, slots=slots, confidence=0.95) for actual in (1.0, 0.9))
    assert right.group == wrong.group == group
    # With real noise: each of these fails by chance once in 20,000 times or less.
    assert right.p_value > 1e-5
    assert wrong.p_value < 0.05
    assert 0.85 / z < right.mu_lower < 1.1 / z < 1.1 * wrong.mu_lower
    low, high = wrong.noise_ratio
    assert 0.8 < low < high < 1.0


def test_noise_on_a_grid_in_many_slots_at_once() -> None:
    """The canaries' gradients have one coordinate a layer: truncation to the grid must not throw them away."""
    right, wrong = (play(0.8, actual, discrete=True, slots=64, trials=6000) for actual in (1.0, 0.8))
    assert right.p_value > 1e-5
    assert wrong.p_value < 1e-9
    assert right.mu_lower > 0.8 / 0.8


def test_rate_of_false_alarms_and_power_are_those_of_the_binomial() -> None:
    """150 games: how often the lower bound exceeds the truth, and how often a fifth less noise is caught."""
    normals = np.random.default_rng(3)
    games, trials, confidence = 150, 160, 0.95
    right = [play_with(normals, 1.0, 1.0, trials, confidence) for _ in range(games)]
    alarms = sum(g.mu_lower > g.mu_claimed for g in right)
    assert alarms <= binom.isf(1e-4, games, 1 - confidence)
    assert sum(g.p_value < 1 - confidence for g in right) == alarms
    wrong = sum(play_with(normals, 1.0, 0.8, trials, confidence).p_value < 1 - confidence for _ in range(games))
    critical = int(binom.ppf(1 - confidence, 2 * trials, norm.cdf(-0.5))) - 1
    power = binom.cdf(critical, 2 * trials, norm.cdf(-0.5 / 0.8))
    assert abs(wrong / games - power) < 4 * math.sqrt(power * (1 - power) / games) + 0.03
    assert power > 0.4


def test_a_sum_that_is_not_clipped_is_caught() -> None:
    key = Randomness.from_system()
    game = play_step_game(
        lambda module, loss, examples: PerExampleGradients(module, 1.3 * C, workers=1).sum(loss, examples),
        lambda total, step: GaussianMechanism(1 / 1.3, EXPECTED).release(total, key, step),
        clipping_norm=C,
        noise_multiplier=1.0,
        expected_examples=EXPECTED,
        trials=5000,
        slots=8,
    )
    assert game.p_value < 1e-6


def test_every_call_has_a_step_number_of_its_own() -> None:
    seen: list[int] = []

    def released(total, step: int) -> list[Tensor]:
        seen.append(step)
        return [torch.randn_like(s) for s in total.sums]

    play_step_game(
        lambda module, loss, examples: PerExampleGradients(module, C, workers=1).sum(loss, examples),
        released,
        clipping_norm=C,
        noise_multiplier=1.0,
        expected_examples=1.0,
        trials=50,
    )
    assert seen == list(range(100))


@pytest.mark.parametrize(("mu", "delta"), [(0.2, 1e-5), (1.0, 1e-5), (2.5, 1e-6), (0.01, 0.1)])
def test_epsilon_of_a_gaussian_step_agrees_with_the_accountant(mu, delta) -> None:
    blind = StepGame(np.zeros(50), np.zeros(50), 1, 1, 1 / mu, 0.999).bound(delta)
    assert blind.claimed == pytest.approx(epsilon([Mechanism(1.0, 1 / mu, 1)], delta), abs=2e-3)
    assert blind.lower == 0


@pytest.mark.parametrize("wrong", [{"noise_multiplier": 0.0}, {"confidence": 0.5}, {"trials": 0}, {"slots": 0}])
def test_what_cannot_be_audited_is_refused(wrong) -> None:
    settings = {"clipping_norm": 1.0, "noise_multiplier": 1.0, "expected_examples": 1.0} | wrong
    with pytest.raises(ValueError, match="must be"):
        play_step_game(lambda *a: None, lambda *a: [], **settings)  # type: ignore[arg-type]
