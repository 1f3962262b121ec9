"""The noise: its law, its independence, and that its scale comes from the clipped sum itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpsyngen.privacy.clipping import ClippedGradient
from dpsyngen.privacy.noise import fine_normal, noisy_mean
from dpsyngen.privacy.randomness import Randomness

N = 600_000  # more than two chunks


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return fine_normal(Randomness.from_insecure_seed(0), 3, N, "noise").astype(np.float32).astype(np.float64)


def test_moments_and_law(sample) -> None:
    assert abs(sample.mean()) < 5 / math.sqrt(N)
    assert sample.var() == pytest.approx(1.0, abs=5 * math.sqrt(2 / N))
    assert stats.kurtosis(sample) == pytest.approx(0.0, abs=5 * math.sqrt(24 / N))
    assert stats.kstest(sample, "norm").pvalue > 1e-4
    # The tails, where a clamped or truncated sampler would show.
    for z in (3.0, 4.0):
        expected = N * stats.norm.sf(z)
        assert abs((sample > z).sum() - expected) < 6 * math.sqrt(expected)


def test_no_repetition_across_chunks_and_no_correlation(sample) -> None:
    assert len(np.unique(sample)) > 0.95 * N  # fp32 has some ties
    half = N // 2
    for lag in (1, 2, 4, 1 << 18, half):
        a, b = sample[:-lag], sample[lag:]
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / math.sqrt(len(a))


def test_streams_differ_by_key_purpose_and_step_and_repeat_otherwise() -> None:
    key = Randomness.from_insecure_seed(1)
    base = fine_normal(key, 0, 10_000, "noise")
    assert np.array_equal(base, fine_normal(key, 0, 10_000, "noise"))
    for other in (
        fine_normal(key, 1, 10_000, "noise"),
        fine_normal(key, 0, 10_000, "sampling"),
        fine_normal(Randomness.from_insecure_seed(2), 0, 10_000, "noise"),
        fine_normal(Randomness.from_system(), 0, 10_000, "noise"),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06


def clipped(value: float = 0.0, sensitivity: float = 2.0, examples: int = 7) -> ClippedGradient:
    return ClippedGradient(
        [torch.full((300, 400), value), torch.full((50,), value)], sensitivity, examples, torch.zeros(examples), 0
    )


@pytest.mark.parametrize("examples", [0, 7, 500])
def test_standard_deviation_is_z_times_sensitivity_over_the_expected_batch(examples) -> None:
    out = noisy_mean(
        clipped(3.0, 2.0, examples),
        noise_multiplier=5.0,
        expected_examples=10.0,
        randomness=Randomness.from_system(),
        step=0,
    )
    values = torch.cat([t.flatten() for t in out]).double()
    n = len(values)
    # Whatever the realised number of examples: 3/10 and 5 * 2/10.
    assert values.mean() == pytest.approx(0.3, abs=5 * 1.0 / math.sqrt(n))
    assert values.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * n))


def test_all_parameters_get_their_own_noise() -> None:
    a, b = noisy_mean(
        ClippedGradient([torch.zeros(5000), torch.zeros(5000)], 1.0, 0, torch.zeros(0), 0),
        noise_multiplier=1.0,
        expected_examples=1.0,
        randomness=Randomness.from_system(),
        step=0,
    )
    assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 0.08


def test_without_noise_and_bad_arguments() -> None:
    key = Randomness.from_system()
    out = noisy_mean(clipped(3.0, math.inf), noise_multiplier=0.0, expected_examples=10, randomness=key, step=0)
    assert torch.equal(out[1], torch.full((50,), 3.0) / 10)
    with pytest.raises(ValueError, match="no finite sensitivity"):
        noisy_mean(clipped(0.0, math.inf), noise_multiplier=1.0, expected_examples=10, randomness=key, step=0)
    for bad in (
        {"noise_multiplier": -1.0, "expected_examples": 1.0},
        {"noise_multiplier": 1.0, "expected_examples": 0.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            noisy_mean(clipped(), randomness=key, step=0, **bad)
