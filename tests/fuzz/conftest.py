"""How much is tried, and a count of it at the end.

``DPSYNGEN_FUZZ=100 pytest tests/fuzz`` tries a hundred times as many inputs, other ones each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz import properties


@pytest.fixture(autouse=True)
def _says_nothing(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Neither Python nor a C library writes to the terminal, whatever the input."""
    yield
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if properties.tried:
        parts = (f"{kind} {n:,} ({properties.accepted[kind]:,} read)" for kind, n in sorted(properties.tried.items()))
        terminalreporter.write_line(f"inputs tried: {properties.tried.total():,}: {', '.join(parts)}")
