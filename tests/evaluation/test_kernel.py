"""Kernel distance against its definition, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import distances as module
from dpsyngen.evaluation.distances import KernelDistance


def sets(n: int = 40, m: int = 60, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0.3, 1, (n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """MMD² of the cubic kernel over all pairs of different images, written out in fp64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m, d = len(x), len(y), x.shape[1]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / d + 1) ** 3)

    within_x = np.mean([k(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
    return float(within_x + within_y - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_a_subset_of_all_is_the_definition() -> None:
    x, y = sets(40, 40)
    estimate = KernelDistance(y, seed=0, subsets=1)(x)
    assert estimate.value == pytest.approx(unbiased(x, y), rel=1e-4)
    assert "1 subsets of 40" in estimate.protocol


def test_influence_is_the_derivative_by_the_weight_of_an_image() -> None:
    x, y = sets(30, 30)
    influence = KernelDistance(y, seed=0)(x, scatter=True).influence
    k_xx = (x.astype(np.float64) @ x.T / 5 + 1) ** 3 * (1 - np.eye(30))
    k_xy = ((x.astype(np.float64) @ y.T / 5 + 1) ** 3).mean(1)

    def of_x(w: np.ndarray) -> float:
        """What depends on x in the distance, with weights: pairs of an image with itself are left out."""
        return float(w @ k_xx @ w / (1 - w @ w) - 2 * w @ k_xy)

    base = np.full(30, 1 / 30)
    slopes = [(of_x(base + 1e-5 * (e - base)) - of_x(base - 1e-5 * (e - base))) / 2e-5 for e in np.eye(30)]
    np.testing.assert_allclose(influence, slopes, rtol=1e-3, atol=1e-3)
    assert abs(influence.mean()) < 1e-12


def test_unbiased_where_the_sets_are_alike() -> None:
    rng = np.random.default_rng(1)
    values = [
        KernelDistance(rng.normal(size=(50, 4)).astype(np.float32), seed=i)(
            rng.normal(size=(30, 4)).astype(np.float32)
        ).value
        for i in range(60)
    ]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_blocks_and_earlier_calls_change_nothing(monkeypatch) -> None:
    x, y = sets()
    measure = KernelDistance(y, seed=3, subsets=5, subset_size=20)
    whole = measure(x, scatter=True)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 60 * 7)  # seven rows at a time
    other = measure(x[:25])
    small = KernelDistance(y, seed=3, subsets=5, subset_size=20)
    assert small(x).value == pytest.approx(whole.value, rel=1e-5)
    np.testing.assert_allclose(small(x, scatter=True).influence, whole.influence, atol=1e-6)
    assert measure(x).value == pytest.approx(whole.value, rel=1e-5)
    assert small(x[:25]).value == pytest.approx(other.value, rel=1e-5)


def test_too_few_images_are_refused() -> None:
    x, y = sets()
    for a, b in ((x[:1], y), (x, y[:1])):
        with pytest.raises(ConfigError, match="at least 2 images"):
            KernelDistance(b, seed=0)(a)
    with pytest.raises(ConfigError, match="at least 1 of 2"):
        KernelDistance(y, seed=0, subset_size=1)
