"""Intervals hold what they say they hold: figures of other generated images, as many, against the same real ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpsyngen.evaluation.distances import Bootstrap, Estimate
from dpsyngen.evaluation.metrics import NAMES, Measures


def test_interval_of_a_mean_is_the_usual_one() -> None:
    x = np.random.default_rng(0).normal(5, 2, 400)
    interval = Bootstrap(400, 4000, seed=0).interval(Estimate(x.mean(), "", x - x.mean()))
    expected = x.mean() + np.array([-1.96, 1.96]) * x.std() / 20
    assert interval == pytest.approx(expected, abs=0.02)


def test_skewed_influence_gives_a_skewed_interval() -> None:
    x = np.random.default_rng(0).exponential(1, 60) ** 2
    low, high = Bootstrap(60, 4000, seed=0).interval(Estimate(x.mean(), "", x - x.mean()))
    assert high - x.mean() > 1.1 * (x.mean() - low)


def test_range_root_and_no_scatter() -> None:
    bootstrap = Bootstrap(50, 500, seed=0)
    x = np.random.default_rng(0).normal(0, 5, 50)
    centred = x - x.mean()
    low, high = bootstrap.interval(Estimate(0.5, "", centred, smallest=0.0, largest=1.0))
    assert (low, high) == (0.0, 1.0)
    plain = bootstrap.interval(Estimate(9.0, "", centred))
    rooted = bootstrap.interval(Estimate(3.0, "", centred, rooted=True))
    assert rooted == pytest.approx(np.sqrt(plain))
    assert bootstrap.interval(Estimate(0.01, "", centred, rooted=True))[0] == 0.0
    assert bootstrap.interval(Estimate(1.0, "", np.zeros(50))) is None
    assert bootstrap.interval(Estimate(1.0, "")) is None


def test_seeded() -> None:
    estimate = Estimate(0.0, "", np.linspace(-1, 1, 30))
    a, b, c = (Bootstrap(30, 100, seed=s).interval(estimate) for s in (0, 0, 1))
    assert a == b != c
    assert Bootstrap(30, 100, seed=0).protocol()["replicates"] == 100


# Smallest share of intervals that may hold the figure's mean.  Recall's and coverage's are wider than they need be.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "scale"), [(0.0, 1.0), (0.1, 1.2)], ids=["generated like real images", "shifted and spread"]
)
def test_coverage_on_gaussians(shift, scale) -> None:
    """Of 100 generators' intervals, about 95 hold the mean figure of sets of that size."""
    d, n, m, runs = 16, 200, 300, 100
    rng = np.random.default_rng(0)
    spread = np.linspace(1, 0.2, d)
    measures = Measures((rng.normal(size=(m, d)) * spread).astype(np.float32), NAMES, seed=0)
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    intervals: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for run in range(runs):
        drawn = np.random.default_rng(1000 + run).normal(size=(n, d)) * spread * scale + shift
        bootstrap = Bootstrap(n, 200, seed=run)
        for name, estimate in measures.of(drawn.astype(np.float32), scatter=True).items():
            values[name].append(estimate.value)
            intervals[name].append(bootstrap.interval(estimate))
    for name in NAMES:
        truth = np.mean(values[name])
        held = np.mean([low <= truth <= high for low, high in intervals[name]])
        width = np.mean([high - low for low, high in intervals[name]])
        assert held >= 0.86, name  # 95 % less three and more standard errors of 100 runs
        # They say something: not more than twice as wide as the true scatter calls for.
        assert width < 2 * 2 * 1.96 * np.std(values[name]), name


@pytest.mark.slow
def test_frechet_interval_holds_the_closed_form_where_images_are_many() -> None:
    """Against exact statistics of N(0, I), of N(δ, s²I): the true distance is d(δ² + (s − 1)²)."""
    from dpsyngen.evaluation.distances import FeatureStatistics
    from dpsyngen.evaluation.metrics import _frechet

    d, n, runs, delta, s = 4, 4000, 100, 0.3, 1.2
    real = FeatureStatistics(np.zeros(d), np.eye(d), 10**6)
    truth, held = d * (delta**2 + (s - 1) ** 2), 0
    for run in range(runs):
        features = np.random.default_rng(run).normal(delta, s, (n, d)).astype(np.float32)
        low, high = Bootstrap(n, 200, seed=run).interval(_frechet(features, real, scatter=True))
        held += low <= truth <= high
    assert held >= 95 - 3 * math.sqrt(100 * 0.95 * 0.05) - 2
