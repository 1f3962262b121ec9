"""Rows of the metric table, shared by the terminal and the report."""

from __future__ import annotations

from typing import Any


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, protocol) for each figure of :func:`dpsyngen.api.evaluate`."""
    raise NotImplementedError
