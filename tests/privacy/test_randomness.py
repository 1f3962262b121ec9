"""The key: fresh by default, hidden, kept, never silently replaced."""

from __future__ import annotations

import random
import stat

import numpy as np
import pytest
import torch

from dpsyngen.errors import RunError
from dpsyngen.privacy.randomness import Randomness


def test_keys_of_the_system_differ_and_are_secure() -> None:
    a, b = Randomness.from_system(), Randomness.from_system()
    assert a != b
    assert a.secure
    assert b.secure
    assert not np.array_equal(a.words("noise", 0, 4), b.words("noise", 0, 4))


def test_no_seed_of_the_process_makes_a_key_predictable() -> None:
    keys = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what a user's script may do
        torch.manual_seed(0)
        keys.append(Randomness.from_system())
    assert keys[0].key_forms() != keys[1].key_forms()


def test_insecure_seed_repeats_and_says_so() -> None:
    a, b, c = (Randomness.from_insecure_seed(s) for s in (1, 1, 2))
    assert np.array_equal(a.words("noise", 5, 8), b.words("noise", 5, 8))
    assert not np.array_equal(a.words("noise", 5, 8), c.words("noise", 5, 8))
    assert not a.secure
    assert a.insecure_seed == 1


def test_key_is_not_shown(tmp_path) -> None:
    key = Randomness.from_system()
    key.save(tmp_path / "k")
    secret = (tmp_path / "k").read_text().split('"')[3]
    assert len(secret) == 64
    assert secret not in repr(key)
    assert str(bytes.fromhex(secret)) not in repr(key)


def test_round_trip_mode_and_no_overwriting(tmp_path) -> None:
    key = Randomness.from_system()
    key.save(tmp_path / "k")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert Randomness.load(tmp_path / "k") == key
    with pytest.raises(FileExistsError):
        Randomness.from_system().save(tmp_path / "k")
    assert Randomness.load(tmp_path / "k") == key


@pytest.mark.parametrize(
    "content", ["", "{}", '{"key": "00", "insecure_seed": null}', '{"key": "zz", "insecure_seed": 1}', "[1]"]
)
def test_damaged_file(tmp_path, content) -> None:
    (tmp_path / "k").write_text(content)
    with pytest.raises(RunError, match="cannot be"):
        Randomness.load(tmp_path / "k")


def test_uniform_words_are_uniform() -> None:
    words = Randomness.from_system().words("sampling", 0, 100_000)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64)
    assert abs(bits.mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(len(words))


def test_tag_depends_on_key_and_text() -> None:
    a, b = Randomness.from_insecure_seed(1), Randomness.from_insecure_seed(2)
    assert a.tag("x") == a.tag("x") != a.tag("y")
    assert a.tag("x") != b.tag("x")
