"""What an audit found: a finding for each property and lower bounds on ε, for a program and for a person."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dpsyngen.errors import require


@dataclass(frozen=True)
class Finding:
    """One property that was checked."""

    name: str
    passed: bool
    statistic: str  # what was measured
    null: str  # what the statistic is if the property holds: a distribution or an exact value
    detail: str = ""  # more for a reader, such as where it failed
    p_value: float | None = None  # None for a property that holds exactly or not at all
    level: float = 0.0  # the p-value below which the finding fails; exact properties have no false alarms


def by_p_value(name: str, statistic: str, null: str, p_value: float, detail: str = "") -> Finding:
    """A finding that :func:`decide` judges by its p-value."""
    return Finding(name, False, statistic, null, detail, min(max(p_value, 0.0), 1.0), math.nan)


def decide(findings: Iterable[Finding], error: float) -> list[Finding]:
    """Judge the tests among the findings so that all of them together fail a correct mechanism with at most `error`."""
    require(0 < error < 1, "error", error, "in (0, 1)")
    findings = list(findings)
    # Bonferroni: each test gets the same share of the family-wise error, which needs no independence.
    level = error / max(sum(f.p_value is not None for f in findings), 1)
    return [f if f.p_value is None else replace(f, level=level, passed=f.p_value >= level) for f in findings]


@dataclass(frozen=True)
class Bound:
    """What an attack showed: training is not (ε, `delta`)-DP for any ε below `lower`, where `claimed` is claimed."""

    attack: str
    lower: float
    claimed: float
    delta: float


@dataclass
class AuditReport:
    """Everything about one audit of one run.  Private."""

    run: str
    epsilon: float  # what the run claims; infinite without privacy
    delta: float
    confidence: float  # with which a correct installation passes everything, at least; and of each lower bound
    parts: dict[str, list[Finding]] = field(default_factory=dict)  # by what was audited
    notes: list[str] = field(default_factory=list)  # what a reader must know, such as why something was left out
    bounds: list[Bound] = field(default_factory=list)  # of each attack
    step: dict[str, Any] | None = None  # the figures of the step-level game
    one_run: dict[str, Any] | None = None  # the figures of the one-run audit
    seconds: float = 0.0

    @property
    def failures(self) -> list[tuple[str, Finding]]:
        """What contradicts the claim, with the part it belongs to."""
        return [(part, f) for part, findings in self.parts.items() for f in findings if not f.passed]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON: no infinities, no scores."""
        return {
            "run": self.run,
            "epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon,
            "delta": self.delta,
            "passed": self.passed,
            "confidence": self.confidence,
            "seconds": round(self.seconds, 1),
            "notes": self.notes,
            "findings": [{"part": part, **asdict(f)} for part, of in self.parts.items() for f in of],
            "step": self.step,
            "one_run": self.one_run,
        }

    def lines(self) -> Iterator[str]:
        """The table that the command line prints."""
        if self.bounds:
            yield f"{'attack':<44} {'lower bound':>12}    {'claimed':>9}   δ"
            for b in self.bounds:
                sign = "≤" if b.lower <= b.claimed else ">"
                yield f"{b.attack:<44} ε ≥ {b.lower:>8.4f}  {sign} {b.claimed:>9.4f}   {b.delta:.3g}"
            yield ""
        for part, findings in self.parts.items():
            yield part
            for f in findings:
                chance = "" if f.p_value is None else f"  (p = {f.p_value:.2g})"
                yield f"  {'ok  ' if f.passed else 'FAIL'}  {f.name}: {f.statistic}{chance}"
                if not f.passed:
                    yield f"        expected: {f.null}{'; ' + f.detail if f.detail else ''}"
        yield ""
        yield from self.notes
        levels = [f.level for of in self.parts.values() for f in of if f.p_value is not None]
        if levels:
            yield (
                f"{len(levels)} tests, which fail below p = {levels[0]:.2g}: at most 1 correct installation in "
                f"{round(1 / (1 - self.confidence)):,} fails any of them by chance."
            )
        if self.passed:
            yield (
                f"No audit contradicts the claim.  Lower bounds hold with confidence {self.confidence:.6g} each; "
                "passing proves no upper bound."
            )
            return
        names = "; ".join(dict.fromkeys(f.name for _, f in self.failures))
        yield f"The claim is CONTRADICTED: {names}.  " + (
            "That can be chance: audit the run again, and if that fails too do not release it."
            if all(f.p_value is not None for _, f in self.failures)
            else "This is not chance: do not release the run."
        )
