"""A released generator that came from a stranger: it loads and draws images, or is refused with RunError."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsyngen import Generator
from dpsyngen.errors import DpsyngenError, RunError
from tests.fuzz.mutations import spoil_bytes, spoil_safetensors, spoil_value
from tests.fuzz.properties import accepted, examples, is_printable, nothing_else_happens, tried
from tests.fuzz.releases import description, make_release, weights

pytestmark = pytest.mark.slow

numbers = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_release(tmp_path_factory.mktemp("a") / "release")
    Generator(folder).sample(1)  # what is imported late is imported now
    return folder


def draws_or_refuses(kind: str, release: Path) -> bool:
    tried[kind] += 1
    with nothing_else_happens(release):
        try:
            generator = Generator(release)
        except RunError as error:
            is_printable(str(error))
            return False
        # As much as a stranger may ask for is the user's own choice; here few and small ones.
        if generator.resolution > 32:
            return True
        try:
            images = generator.sample(1, steps=2, churn=0.0, sampler="ddim").images
        except DpsyngenError as error:
            is_printable(str(error))
        else:
            assert images.shape == (1, generator.channels, generator.resolution, generator.resolution)
            assert images.dtype == np.uint8
    accepted[kind] += 1
    return True


def test_the_seed_itself_is_read(release: Path) -> None:
    assert draws_or_refuses("seed generator", release)


def test_descriptions(release: Path) -> None:
    file = release / "generator.json"

    @examples(250)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        if random.random() < 0.7:
            try:
                file.write_text(json.dumps(spoil_value(description(), random)))
            except ValueError:  # a number that Python does not write out
                file.write_text("1" * 10_000)
        else:
            text = json.dumps(description()).encode()
            file.write_bytes(spoil_bytes(text, text, random))
        draws_or_refuses("generator.json", release)

    try:
        check()
    finally:
        file.write_text(json.dumps(description()))


def test_weights(release: Path) -> None:
    file = release / "weights" / "context.safetensors"
    good = weights(2)

    @examples(200)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        spoil = spoil_safetensors if random.random() < 0.7 else spoil_bytes
        file.write_bytes(spoil(good, weights(0), random))
        draws_or_refuses("weights", release)

    try:
        check()
    finally:
        file.write_bytes(good)
