"""Poisson sampling: what the accountant assumes is what is done."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpsyngen.privacy.randomness import Randomness, poisson_sample

RECORDS, RATE, STEPS = 400, 0.05, 4000


@pytest.fixture(scope="module")
def inclusion() -> np.ndarray:
    key = Randomness.from_insecure_seed(11)
    out = np.zeros((STEPS, RECORDS), dtype=bool)
    for step in range(STEPS):
        out[step, poisson_sample(key, step, RECORDS, RATE)] = True
    return out


def test_every_record_is_included_at_the_rate(inclusion) -> None:
    total = inclusion.mean()
    assert total == pytest.approx(RATE, abs=5 * math.sqrt(RATE * (1 - RATE) / inclusion.size))
    per_record = inclusion.mean(0)
    assert abs(per_record - RATE).max() < 5.5 * math.sqrt(RATE * (1 - RATE) / STEPS)


def test_batch_sizes_vary_as_a_binomial(inclusion) -> None:
    """Batches of a fixed size, or shuffled ones, have far less variance."""
    sizes = inclusion.sum(1)
    expected = RECORDS * RATE * (1 - RATE)
    assert sizes.var() == pytest.approx(expected, rel=6 * math.sqrt(2 / STEPS))


def test_records_are_independent_of_each_other_and_of_other_steps(inclusion) -> None:
    x = inclusion - RATE
    pairs = (x.T @ x) / STEPS / (RATE * (1 - RATE))
    off = pairs[~np.eye(RECORDS, dtype=bool)]
    assert abs(off).max() < 7 / math.sqrt(STEPS)
    for lag in (1, 2, 7):
        # Shuffling into epochs makes a record less likely soon after it was used.
        assert abs((x[:-lag] * x[lag:]).mean()) / (RATE * (1 - RATE)) < 6 / math.sqrt(inclusion.size)


def test_empty_batches_occur_at_their_rate() -> None:
    key = Randomness.from_insecure_seed(3)
    empty = np.mean([len(poisson_sample(key, s, 10, 0.1)) == 0 for s in range(4000)])
    assert empty == pytest.approx(0.9**10, abs=0.04)


def test_rate_one_takes_all_and_order_is_fixed() -> None:
    key = Randomness.from_system()
    assert poisson_sample(key, 0, 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(poisson_sample(key, 3, 1000, 0.3), poisson_sample(key, 3, 1000, 0.3))
    assert not np.array_equal(poisson_sample(key, 3, 1000, 0.3), poisson_sample(key, 4, 1000, 0.3))
    assert len(poisson_sample(key, 0, 0, 0.5)) == 0


def test_one_more_record_leaves_the_others_inclusion_alone() -> None:
    """Neighbouring data sets: the other records' inclusions are the same coins."""
    key = Randomness.from_insecure_seed(5)
    small, large = (poisson_sample(key, 0, n, 0.4) for n in (100, 101))
    assert np.array_equal(small, large[large < 100])


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_bad_rates(rate) -> None:
    with pytest.raises(ValueError, match="must be in"):
        poisson_sample(Randomness.from_system(), 0, 5, rate)


@pytest.mark.parametrize("records", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
def test_drawing_in_blocks_chooses_the_records_of_one_long_stream(records) -> None:
    key = Randomness.from_insecure_seed(3)
    words = key.words("sampling", 7, records)
    assert len(words) == records
    chosen = poisson_sample(key, 7, records, 0.01)
    assert chosen.dtype == np.int64
    assert np.array_equal(chosen, np.flatnonzero(words < np.uint64(int(0.01 * 2**64))))
    blocks = list(key.word_blocks("sampling", 7, records, block=1001))
    assert all(len(block) <= 1001 for block in blocks)
    assert np.array_equal(np.concatenate([words[:0], *blocks]), words)
