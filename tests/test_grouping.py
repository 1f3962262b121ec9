"""Tests that share what is slow to make run in one process (tests/conftest.py), with the versions that there are."""

from __future__ import annotations

import pytest


def test_the_schedule_knows_the_group(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 writes it into the name of the test, which pytest 9.2 does not let it do, without an error."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@tests/test_grouping.py")
