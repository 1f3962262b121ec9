"""One small finished run, with real entropy, that the tests of bundles share."""

from __future__ import annotations

from pathlib import Path

import pytest

import dpsyngen
from dpsyngen.report.bundle import pack
from dpsyngen.report.signing import make_key
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "r"
    return dpsyngen.train(tiny_arrays(), epsilon=4.0, out=out, settings=TINY_SETTINGS)


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "k.pem"
    make_key(path)
    return path


@pytest.fixture(scope="session")
def bundle(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unsigned, with samples."""
    dpsyngen.write_report(finished)
    return pack(finished, tmp_path_factory.mktemp("bundles") / "b.zip", samples=9, seed=5).path


@pytest.fixture(scope="session")
def signed(finished: Run, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(finished, tmp_path_factory.mktemp("bundles") / "s.zip", key=key).path
