"""How the tests themselves are shared out."""

from __future__ import annotations

import pytest


def test_a_file_stays_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist reads the group at the end of a test's name; without it each process makes all fixtures."""
    grouped = bool(request.config.getoption("loadgroup", False))
    assert request.node.nodeid.endswith("@tests/test_groups.py") == grouped
