"""Sliced Wasserstein distance against closed forms, and against transport solved as a linear programme."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.distances import SlicedWasserstein, potentials, squared_transport


def as_linear_programme(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    n, m = len(x), len(y)
    w = np.full(n, 1 / n) if weights is None else weights
    rows = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    cost = ((x[:, None] - y) ** 2).reshape(-1)
    return float(linprog(cost, A_eq=rows, b_eq=np.concatenate([w, np.full(m, 1 / m)])).fun)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 12), (12, 7), (6, 9), (1, 5)])
def test_transport_in_one_dimension(n, m) -> None:
    rng = np.random.default_rng(n * 100 + m)
    x, y = np.sort(rng.normal(0.5, 2, n)), np.sort(rng.normal(size=m))
    assert squared_transport(x[:, None], y[:, None])[0] == pytest.approx(as_linear_programme(x, y))


@pytest.mark.parametrize(("n", "m"), [(7, 11), (11, 7), (8, 8)])
def test_potentials_are_derivatives(n, m) -> None:
    rng = np.random.default_rng(n * 100 + m)
    x, y = np.sort(rng.normal(0.5, 2, n)), np.sort(rng.normal(size=m))
    f = potentials(x[:, None], y[:, None])[:, 0]
    base = np.full(n, 1 / n)
    for i in range(n):
        there = base + 1e-3 * (np.eye(n)[i] - base)
        back = base - 1e-3 * (np.eye(n)[i] - base)
        slope = (as_linear_programme(x, y, there) - as_linear_programme(x, y, back)) / 2e-3
        # Where n = m the two one-sided derivatives differ, and theirs is the mean as well.
        assert f[i] - f.mean() == pytest.approx(slope, abs=1e-6)


def test_shift_and_scale() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 6)).astype(np.float32)
    measure = SlicedWasserstein(real, seed=0, directions=4000)
    assert measure(real).value == pytest.approx(0, abs=1e-5)
    # A shift by v moves every image by ⟨θ, v⟩, whose mean square is ‖v‖²/d.
    assert measure(real + np.float32(3)).value == pytest.approx(3, rel=0.05)
    centre = real.mean(0)
    spread = np.sqrt(real.var(0).mean())
    assert measure(2 * (real - centre) + centre).value == pytest.approx(spread, rel=0.05)


def test_influence_predicts_what_more_weight_does() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(90, 3)).astype(np.float32), rng.normal(0.4, 1.3, (59, 3)).astype(np.float32)
    measure = SlicedWasserstein(real, seed=0, directions=20)
    estimate = measure(made, scatter=True)
    assert estimate.rooted
    assert estimate.influence.mean() == pytest.approx(0, abs=1e-9)
    for i in range(5):
        # Every image 400 times, image i once more: too little for another real image to become its partner.
        more = np.concatenate([np.repeat(made, 400, 0), made[i : i + 1]])
        change = measure(more).value ** 2 - estimate.value**2
        assert change * len(more) == pytest.approx(estimate.influence[i], rel=0.02, abs=0.02)


def test_seed_and_directions() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(0.4, 1, (40, 3)).astype(np.float32)
    values = {SlicedWasserstein(real, seed=s, directions=17)(made).value for s in (0, 0, 1)}
    assert len(values) == 2
    assert "17 random directions" in SlicedWasserstein(real, seed=0, directions=17)(made).protocol
    with pytest.raises(ConfigError, match="at least 1"):
        SlicedWasserstein(real, seed=0, directions=0)
