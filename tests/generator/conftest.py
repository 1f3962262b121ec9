"""A generator that its tests share; not to be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsyngen import Generator
from tests.conftest import TINY_SETTINGS, tiny_arrays

NAMES = np.array(["cat", "dog", "<b>cow</b>"])


def fit(out: Path, **options: Any) -> Generator:
    images, labels = tiny_arrays()
    given = {"epsilon": 4.0, "settings": TINY_SETTINGS, "out": out, "progress": False} | options
    return Generator.fit(images, NAMES[labels], **given)


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return fit(tmp_path_factory.mktemp("fitted") / "run")


@pytest.fixture(scope="session")
def bundle(generator: Generator) -> Path:
    assert generator.place.run is not None
    return generator.save(generator.place.run.parent / "cats.zip")
