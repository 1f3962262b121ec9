"""A tiny experiment that takes seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpsyngen.experiments import pool
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.spec import load_spec
from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.npz and test.npz."""
    folder = tmp_path_factory.mktemp("tiny-data")
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = tiny_arrays(seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return folder


@pytest.fixture
def tiny_spec(tmp_path, tiny_data):
    """Writes a specification of tiny runs; entries given replace its own.  Nothing is measured unless asked for."""
    return writer(tmp_path, tiny_data)


@pytest.fixture(scope="session")
def worked(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of the tiny experiment as it comes, all of it done; not to be changed."""
    folder = tmp_path_factory.mktemp("worked")
    experiment = Experiment.open_or_create(folder / "x", load_spec(writer(folder, tiny_data)()))
    assert pool.work(experiment)
    return experiment.path


@pytest.fixture
def done(worked: Path, tmp_path: Path) -> Experiment:
    """A copy of the done experiment, at ``tmp_path / "x"``."""
    shutil.copytree(worked, tmp_path / "x")
    return Experiment(tmp_path / "x")


def writer(folder: Path, data: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        settings = {k: dict(v) for k, v in TINY_SETTINGS.items() if k != "sampling"}
        settings["stages"].pop("variant")  # the grid's
        values: dict[str, Any] = {
            "name": "tiny",
            "data": {"train": str(data / "train.npz"), "test": str(data / "test.npz")},
            "settings": settings,
            "grid": {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 1},
            "references": [],
            "sampling": {"images": 12, "steps": 2},
            "evaluation": {"features": [], "classifiers": []},
            "noise": "seeded",
        }
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
        return path

    return write
