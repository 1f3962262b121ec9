"""Rows of figures, whatever fields they have, as a table with only the columns that say something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

_PLAIN = ("figure", "value", "how to read it")
_WORDS = {"name": "figure", "note": "how to read it", "protocol": "how to read it", "interval": "95 % interval"}


def figure_table(rows: Sequence[Any]) -> dict[str, Any]:
    """Columns and cells of figures.

    Args:
        rows: of one kind: dataclasses, named tuples, mappings, or plain tuples of (name, value, note).

    Returns:
        ``columns``: headings; ``rows``: texts, one for each column.  A column in which all rows are empty is left out.
    """
    named = [_fields(row) for row in rows]
    names = list(dict.fromkeys(name for row in named for name in row))
    used = [name for name in names if any(row.get(name) not in (None, "") for row in named)]
    return {
        "columns": [_WORDS.get(name, name.replace("_", " ")) for name in used],
        "rows": [["" if row.get(name) is None else str(row[name]) for name in used] for row in named],
    }


def _fields(row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if is_dataclass(row) and not isinstance(row, type):
        return {f.name: getattr(row, f.name) for f in fields(row)}
    if hasattr(row, "_asdict"):
        return dict(row._asdict())
    return dict(zip(_PLAIN, row, strict=True))
