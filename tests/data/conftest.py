"""Small data sets made on the spot; nothing here is anybody's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def class_folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two classes of three grey 16×16 PNG images."""
    root = tmp_path / "photos"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def fashion_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder above ``fashion-mnist``, from DPSYNGEN_DATA or ``shared/data`` next to the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("DPSYNGEN_DATA", default))
    if not (root / "fashion-mnist").is_dir():
        pytest.skip(f"Fashion-MNIST is not in {root}; set DPSYNGEN_DATA to the folder above fashion-mnist/")
    monkeypatch.setenv("DPSYNGEN_DATA", str(root))
    return root
