"""How an audit reports: one finding for each property, with the chance that a correct mechanism fails it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One property that was checked.

    Attributes:
        name: the property, in a few words.
        passed: whether the evidence is compatible with it.
        statistic: what was measured.
        null: what the statistic is if the property holds: a distribution or an exact value.
        p_value: chance, if the property holds, of a statistic at least so extreme; None for a property that holds
            exactly or not at all.
        level: the p-value below which the finding fails; 0 for exact properties, which have no false alarms.
        detail: more for a reader, such as where it failed.
    """

    name: str
    passed: bool
    statistic: str
    null: str
    p_value: float | None = None
    level: float = 0.0
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_p_value(name: str, statistic: str, null: str, p_value: float, detail: str = "") -> Finding:
    """A finding that :func:`decide` judges by its p-value."""
    return Finding(name, False, statistic, null, min(max(p_value, 0.0), 1.0), math.nan, detail)


def exact(name: str, passed: bool, statistic: str, null: str, detail: str = "") -> Finding:
    """A finding about a property that holds or does not; there is no chance in it."""
    return Finding(name, passed, statistic, null, None, 0.0, detail)


def decide(findings: Iterable[Finding], error: float) -> list[Finding]:
    """Judge the tests among the findings so that all of them together fail a correct mechanism with at most `error`.

    Bonferroni: each test gets the same share, which needs no independence.

    Args:
        findings: from :func:`by_p_value` and :func:`exact`.
        error: family-wise error rate in (0, 1).
    """
    if not 0 < error < 1:
        raise ValueError(f"error is {error}, but must be in (0, 1).")
    all_of_them = list(findings)
    tests = sum(f.p_value is not None for f in all_of_them)
    out = []
    for f in all_of_them:
        if f.p_value is None:
            out.append(f)
        else:
            level = error / tests
            out.append(replace(f, level=level, passed=f.p_value >= level))
    return out


def clopper_pearson(events: int, trials: int, error: float) -> tuple[float, float]:
    """Exact two-sided confidence interval of a probability (Clopper & Pearson 1934).

    Args:
        events: how often it happened.
        trials: out of how many independent trials.
        error: chance of missing the true value, at most; half of it on each side.
    """
    from scipy.stats import beta

    if not 0 <= events <= trials or trials < 1 or not 0 < error < 1:
        raise ValueError(f"events={events}, trials={trials}, error={error}: need 0 <= events <= trials, 0 < error < 1.")
    low = 0.0 if events == 0 else float(beta.ppf(error / 2, events, trials - events + 1))
    high = 1.0 if events == trials else float(beta.isf(error / 2, events + 1, trials - events))
    return low, high
