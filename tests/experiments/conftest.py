"""A tiny experiment that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.fixture
def tiny_spec(tmp_path):
    """Writes a specification of tiny runs; entries given replace its own.  Nothing is measured unless asked for."""
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = tiny_arrays(seed)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)

    def write(**changes: Any) -> Path:
        settings = {k: dict(v) for k, v in TINY_SETTINGS.items() if k != "sampling"}
        settings["stages"].pop("variant")  # the grid's
        values: dict[str, Any] = {
            "name": "tiny",
            "data": {"train": str(tmp_path / "train.npz"), "test": str(tmp_path / "test.npz")},
            "settings": settings,
            "grid": {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 1},
            "references": [],
            "sampling": {"images": 12, "steps": 2},
            "evaluation": {"features": [], "classifiers": []},
            "noise": "seeded",
        }
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
        return path

    return write
