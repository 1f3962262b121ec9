"""Precision, recall, density and coverage against the definitions, image by image."""

from __future__ import annotations

import numpy as np
import pytest

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import neighbours as module
from dpsyngen.evaluation.neighbours import Manifold


def sets(n: int = 50, m: int = 70, d: int = 4, shift: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return (rng.normal(size=(n, d)) * 1.2 + shift).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)


def brute_force(made: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()))

    def radius(x: np.ndarray, i: int) -> float:
        return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    of_real = [radius(real, i) for i in range(len(real))]
    of_made = [radius(made, j) for j in range(len(made))]
    between = np.array([[distance(a, b) for b in real] for a in made])  # [generated, real]
    in_real = between <= np.array(of_real)
    in_made = between <= np.array(of_made)[:, None]
    return {
        "precision": float(in_real.any(1).mean()),
        "recall": float(in_made.any(0).mean()),
        "density": float(in_real.sum() / (k * len(made))),
        "coverage": float(in_real.any(0).mean()),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.6, 3.0])
def test_against_brute_force(k, shift) -> None:
    made, real = sets(shift=shift)
    found = Manifold(real, k=k)(made)
    assert {name: e.value for name, e in found.items()} == pytest.approx(brute_force(made, real, k))
    assert all(e.protocol == f"k = {k}" for e in found.values())


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_influence_is_what_leaving_an_image_out_takes_away(shift) -> None:
    made, real = sets(n=30, m=40, shift=shift)
    found = Manifold(real, k=2)(made, scatter=True)
    whole = brute_force(made, real, 2)
    left_out = [brute_force(np.delete(made, j, 0), real, 2) for j in range(len(made))]
    for name, estimate in found.items():
        jackknife = (len(made) - 1) * (whole[name] - np.array([out[name] for out in left_out]))
        assert np.ptp(jackknife) > 0
        np.testing.assert_allclose(estimate.influence, jackknife - jackknife.mean(), atol=1e-9, err_msg=name)


def test_blocks_change_nothing(monkeypatch) -> None:
    made, real = sets()
    whole = Manifold(real)(made, scatter=True)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 70 * 3)
    pieces = Manifold(real)(made, scatter=True)  # three rows at a time
    for name, estimate in whole.items():
        assert pieces[name].value == pytest.approx(estimate.value)
        np.testing.assert_allclose(pieces[name].influence, estimate.influence, atol=1e-12)


def test_copies_of_the_real_images_and_images_far_away() -> None:
    made, real = sets()
    copies = Manifold(real)(real)
    assert [copies[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    far = Manifold(real)(made + 100)
    assert [far[name].value for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]
    # One image over and over: precise, and covers next to nothing.
    one = Manifold(real)(np.repeat(real[:1], 50, 0))
    assert one["precision"].value == 1
    assert one["coverage"].value < 0.2
    assert one["recall"].value == pytest.approx(1 / len(real))


def test_a_common_shift_does_not_matter() -> None:
    made, real = sets()
    expected = Manifold(real)(made)
    moved = Manifold(real + 1000)(made + 1000)  # fp32 products of numbers around 1000 alone would lose all digits
    for name, estimate in moved.items():
        assert estimate.value == pytest.approx(expected[name].value, abs=0.03)


def test_sets_without_so_many_neighbours_are_refused() -> None:
    made, real = sets()
    for a, b in ((made[:6], real), (made, real[:5])):
        with pytest.raises(ConfigError, match="above k"):
            Manifold(b)(a)
    with pytest.raises(ConfigError, match="k is 0"):
        Manifold(real, k=0)
