"""Series from the logs of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def curves(log: Iterable[Mapping[str, Any]], name: str) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of what `name` calls, for each phase of a log; values that are missing or not finite are left out.

    Args:
        log: lines with ``phase`` and ``step``, as :meth:`JsonLines.read` gives them.
        name: such as "loss".
    """
    out: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        value = line.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            out.setdefault(str(line["phase"]), []).append((line["step"], float(value)))
    return {phase: sorted(points) for phase, points in out.items()}
