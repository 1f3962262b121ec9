"""What a score says beside the accuracy: interval, balance and confusion."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom

from dpsyngen.evaluation.cas import ClassifierResult, classification_accuracy, clopper_pearson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # From tables of the exact interval.
    [(0, 10, 0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1), (81, 263, 0.2527, 0.3676), (0, 0, 0, 1)],
)
def test_interval_is_the_exact_one(right, total, low, high) -> None:
    assert clopper_pearson(right, total) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@pytest.mark.parametrize("p", [0.02, 0.5, 0.83])
def test_interval_covers_as_often_as_it_says(p) -> None:
    n = 60
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if clopper_pearson(k, n)[0] <= p <= clopper_pearson(k, n)[1])
    assert 0.95 <= covered <= 0.995


def test_confusion_counts_true_by_predicted() -> None:
    training = {"validation_accuracy": 0.9, "chosen": "", "n_train": 1, "n_validation": 1}
    result = ClassifierResult.of(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 4, **training)
    assert result.confusion == ((1, 1, 0, 0), (0, 1, 0, 0), (2, 0, 0, 0), (0, 0, 0, 0))
    assert result.per_class_accuracy[:3] == [0.5, 1, 0]
    assert np.isnan(result.per_class_accuracy[3])
    assert (result.accuracy, result.n_test) == (0.4, 5)


def test_balanced_accuracy_gives_each_class_the_same_weight() -> None:
    matrix = ((90, 0, 0), (5, 5, 0), (0, 0, 0))
    result = ClassifierResult(0.95, 0.9, "", [1.0, 0.5, np.nan], 1, 1, 100, confusion=matrix)
    assert result.balanced_accuracy == pytest.approx(0.75)
    out = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert out["balanced_accuracy"] == pytest.approx(0.75)
    assert out["accuracy_low"] == pytest.approx(0.8872, abs=6e-5)
    assert out["accuracy_high"] == pytest.approx(0.9836, abs=6e-5)
    assert out["confusion"] == [[90, 0, 0], [5, 5, 0], [0, 0, 0]]
    assert out["per_class_accuracy"][2] is None


def test_a_score_agrees_with_its_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    labels, truth = np.arange(60) % 3, np.arange(50) % 2
    images = (60 * labels[:, None, None, None] + rng.integers(0, 90, (60, 1, 8, 8))).astype(np.uint8)
    test = (60 * truth[:, None, None, None] + rng.integers(0, 90, (50, 1, 8, 8))).astype(np.uint8)
    test[:10] = images[2]  # of the class that the test set lacks: errors
    score = classification_accuracy(images, labels, test, truth, num_classes=3, classifiers=("logreg",))["logreg"]
    matrix = np.array(score.confusion)
    assert matrix.sum(1).tolist() == [25, 25, 0]
    assert matrix[:, 2].sum() >= 10
    assert np.trace(matrix) / 50 == pytest.approx(score.accuracy)
    assert score.accuracy_interval[0] < score.accuracy < score.accuracy_interval[1]
    assert score.balanced_accuracy == pytest.approx(np.mean(score.per_class_accuracy[:2]))
