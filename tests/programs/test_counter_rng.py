"""Philox4x32-10 against the published answers, and the doubles made from it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpsyngen.programs.drawing.counter_rng import philox4x32, to_unit, unit_vector, words

# Random123 1.x, file kat_vectors: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[np.uint64]:
    return [np.uint64(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert [int(w) for w in philox4x32(*_hex(counter), *_hex(key))] == [int(w) for w in _hex(answer)]


def test_words_place_seed_stream_index_and_block() -> None:
    # The third published vector, with key = seed and counter = (block, stream, index low, index high).
    first, second = words(
        np.uint64(0x299F31D0A4093822),
        np.uint64(0x85A308D3),
        np.uint64(0x0370734413198A2E),
        np.uint64(0x243F6A88),
    )
    assert (int(first), int(second)) == (0x94FDCCEBD16CFE09, 0x24126EA15001E420)


@pytest.mark.parametrize(("word", "unit"), [(0, 0.0), (2**11, 2.0**-53), (2**63, 0.5), (2**64 - 1, 1 - 2.0**-53)])
def test_to_unit_keeps_53_bits(word: int, unit: float) -> None:
    assert to_unit(np.uint64(word)) == unit


def test_unit_vectors_are_uniform_directions() -> None:
    angles = []
    block = np.uint64(0)
    for _ in range(4000):
        x, y, after = unit_vector(np.uint64(3), np.uint64(1), np.uint64(0), block)
        assert after > block
        assert abs(x * x + y * y - 1) < 1e-14
        angles.append(np.arctan2(y, x) / (2 * np.pi) + 0.5)
        block = np.uint64(after)
    assert stats.kstest(angles, "uniform").pvalue > 1e-3
