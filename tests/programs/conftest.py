"""The fonts that matplotlib ships, and no others."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest


@pytest.fixture(autouse=True)
def shipped_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outlines that a system has installed must not change what tests see."""
    monkeypatch.setenv("DPSYNGEN_FONTS", str(Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf"))
