"""JSON that every reader takes: infinity and NaN, for which JSON has no word, are the strings "inf", "-inf", "nan"."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def strict(value: Any) -> Any:
    """`value` with words for numbers that JSON lacks, text for paths, and lists for tuples, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value


def strict_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text."""
    return json.dumps(strict(value), ensure_ascii=False, allow_nan=False, indent=indent)


def number(value: Any) -> Any:
    """The number that one of the words stands for; anything else as it is."""
    return _WORDS.get(value, value) if isinstance(value, str) else value
