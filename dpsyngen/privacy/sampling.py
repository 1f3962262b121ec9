"""Poisson sampling of records: each in or out on its own, batches of varying size, empty ones included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.privacy.randomness import Randomness


def poisson_sample(randomness: Randomness, step: int, records: int, sampling_rate: float) -> NDArray[np.int64]:
    """Indices of the records that step `step` uses, ascending.

    Formal guarantee: record i is included exactly when its own 64-bit word of the step's stream is below
    floor(sampling_rate * 2^64), so the inclusions are independent of each other, of the steps and of the data, each
    with a probability of at most `sampling_rate`.

    Args:
        randomness: the run's secret streams.
        step: number of the step.
        records: number of records present (may differ from the declared number that fixed the rate).
        sampling_rate: q in (0, 1].
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate is {sampling_rate}, but must be in (0, 1].")
    if sampling_rate == 1:
        return np.arange(records, dtype=np.int64)
    threshold = np.uint64(int(sampling_rate * 2**64))
    chosen, start = [np.zeros(0, dtype=np.int64)], 0
    # In blocks: memory is that of the chosen indices, however many records there are.
    for words in randomness.word_blocks("sampling", step, records):
        chosen.append(np.flatnonzero(words < threshold) + start)
        start += len(words)
    return np.concatenate(chosen)
