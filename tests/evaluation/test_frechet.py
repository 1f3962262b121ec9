"""Fréchet distance against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import FeatureStatistics, frechet_distance
from dpsyngen.evaluation.distances import frechet_influence


def gaussian(mean, covariance, n=100) -> FeatureStatistics:
    return FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), n)


def test_identical_shifted_and_scaled() -> None:
    rng = np.random.default_rng(0)
    a = FeatureStatistics.of(rng.normal(size=(500, 8)))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    shifted = FeatureStatistics(a.mean + 2.0, a.covariance, a.count)
    assert frechet_distance(a, shifted) == pytest.approx(8 * 4.0)
    # Diagonal covariances: sum of squared differences of standard deviations.
    x, y = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0])), gaussian([1, 0, 0], np.diag([4.0, 4.0, 0.0]))
    assert frechet_distance(x, y) == pytest.approx(1 + 1 + 0 + 9)
    assert frechet_distance(y, x) == pytest.approx(11)


@pytest.mark.parametrize("seed", range(4))
def test_against_scipys_square_root(seed) -> None:
    rng = np.random.default_rng(seed)
    a = FeatureStatistics.of(rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)))
    b = FeatureStatistics.of(rng.normal(size=(40, 12)) @ rng.normal(size=(12, 12)) + 1)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_statistics() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    s = FeatureStatistics.of(x)
    np.testing.assert_allclose(s.covariance, np.cov(x.T), atol=1e-12)
    assert s.full_rank
    assert not FeatureStatistics.of(x[:4]).full_rank


def test_bad_features() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        FeatureStatistics.of(np.array([[1.0, np.nan], [0, 1]]))
    with pytest.raises(ConfigError, match="at least 2"):
        FeatureStatistics.of(np.zeros((1, 3)))
    with pytest.raises(ConfigError, match="cannot be compared"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


def test_features_and_their_statistics_give_the_same() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32)
    assert frechet_distance(x, y) == frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


def test_large_sample_of_gaussians_nears_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (50_000, 3)), rng.normal(1, 3, (50_000, 3))
    assert frechet_distance(x, y) == pytest.approx(3 * (1 + 4), rel=0.02)


def test_no_more_images_than_dimensions_is_warned_of() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 8)), rng.normal(size=(500, 8))
    with pytest.warns(UserWarning, match="8 dimensions from 8 images"):
        frechet_distance(x, y)
    with pytest.warns(UserWarning, match="biased upwards"):
        frechet_distance(y, x)


def random_statistics(seed: int, d: int = 6) -> FeatureStatistics:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    return gaussian(rng.normal(size=d), root @ root.T)


@pytest.mark.parametrize("seed", range(3))
def test_symmetric_and_unchanged_by_rotation_and_shift(seed) -> None:
    a, b = random_statistics(seed), random_statistics(seed + 100)
    q = linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]

    def moved(s: FeatureStatistics) -> FeatureStatistics:
        return gaussian(q @ s.mean + 3, q @ s.covariance @ q.T)

    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(moved(a), moved(b)) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    # In squared units: features twice as long, four times the distance.
    twice = [gaussian(2 * s.mean, 4 * s.covariance) for s in (a, b)]
    assert frechet_distance(*twice) == pytest.approx(4 * frechet_distance(a, b), rel=1e-9)


def test_singular_covariances() -> None:
    one, other = np.diag([1.0, 0, 0]), np.diag([0, 4.0, 0])
    # Nothing is shared: tr(Σ_a) + tr(Σ_b).
    assert frechet_distance(gaussian([0, 0, 0], one), gaussian([0, 0, 0], other)) == pytest.approx(5)
    zero = gaussian([1, 2, 2], np.zeros((3, 3)))
    assert frechet_distance(zero, gaussian([0, 0, 0], np.zeros((3, 3)))) == pytest.approx(9)
    # Far fewer images than dimensions, against itself: no complex numbers, no NaN, about 0.
    x = np.random.default_rng(0).normal(size=(10, 200))
    with pytest.warns(UserWarning, match="biased upwards"):
        distance = frechet_distance(x, x)
    assert 0 <= distance < 1e-3


def test_rank_flag_counts_images_against_dimensions() -> None:
    x = np.random.default_rng(0).normal(size=(10, 9))
    assert FeatureStatistics.of(x).full_rank
    assert not FeatureStatistics.of(x[:9]).full_rank
    assert np.linalg.matrix_rank(FeatureStatistics.of(x[:9]).covariance) == 8


def test_infinite_features_and_wrong_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="infinite"):
        FeatureStatistics.of(np.array([[1.0, np.inf], [0, 1]]))
    with pytest.raises(ConfigError, match="at least 2"):
        FeatureStatistics.of(np.zeros(3))


def weighted(x: np.ndarray, weights: np.ndarray) -> FeatureStatistics:
    mean = weights @ x
    centred = x - mean
    return FeatureStatistics(mean, (centred * weights[:, None]).T @ centred * len(x) / (len(x) - 1), 10**6)


@pytest.mark.parametrize("n", [40, 8])
def test_influence_is_the_derivative_by_the_weight_of_an_image(n) -> None:
    """With more images than dimensions, and with fewer."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)) + 0.5
    real = FeatureStatistics.of(rng.normal(size=(100, 12)) * np.linspace(0.3, 2, 12))
    influence = frechet_influence(x, real)
    # Of singular covariances the distance is computed from roots of numbers that should be 0: to about 1e-6.
    base, step = np.full(n, 1 / n), 1e-4
    for i in range(n):
        towards = np.eye(n)[i] - base
        ends = [frechet_distance(weighted(x, base + sign * step * towards), real) for sign in (1, -1)]
        assert influence[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=0.02)
    assert influence.mean() == pytest.approx(0, abs=1e-9)
    assert np.ptp(influence) > 5


def test_influence_of_repeated_images_is_finite() -> None:
    x = np.repeat(np.random.default_rng(0).normal(size=(2, 5)), 10, 0)
    real = FeatureStatistics.of(np.zeros((30, 5)))
    assert np.isfinite(frechet_influence(x, real)).all()
    assert np.isfinite(frechet_influence(np.zeros((4, 5)), real)).all()
