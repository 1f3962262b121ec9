"""The ledger as rows of a table: entries that repeat the one before them, as steps of DP-SGD do, share a row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dpsyngen.privacy.ledger import LedgerEntry


def ledger_rows(entries: Sequence[LedgerEntry]) -> list[dict[str, str]]:
    """Rows of texts: ``entry`` (numbers, from 1), ``kind``, ``reason``, ``runs``, ``rate``, ``noise``,
    ``details``.

    Neighbouring entries share a row if all but their counts and their places agree.  Its runs are their sum, and its
    details those on which they agree.
    """
    rows = []
    numbered = enumerate(entries, 1)
    for _, group in itertools.groupby(numbered, lambda pair: _kind(pair[1])):
        numbers, same = zip(*group, strict=True)
        first, m = same[0], same[0].mechanism
        details = {k: v for k, v in first.details.items() if all(e.details.get(k) == v for e in same)}
        rows.append(
            {
                "entry": str(numbers[0]) if len(same) == 1 else f"{numbers[0]}–{numbers[-1]}",
                "kind": first.kind,
                "reason": first.reason,
                "runs": "" if m is None else f"{sum(e.mechanism.count for e in same if e.mechanism):,}",
                "rate": "" if m is None else f"{m.sampling_rate:.5g}",
                "noise": "" if m is None else f"{m.noise_multiplier:.5g}",
                "details": "; ".join(f"{k.replace('_', ' ')} {_text(v)}" for k, v in details.items()),
            }
        )
    return rows


def _kind(entry: LedgerEntry) -> tuple[Any, ...]:
    """What entries of a row have in common."""
    m = entry.mechanism
    return (entry.kind, entry.reason, None if m is None else (m.sampling_rate, m.noise_multiplier))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None) + ")"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
