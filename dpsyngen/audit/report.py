"""What an audit found, for a program (JSON) and for a person (lines of a table)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpsyngen.audit.distinguish import StepGame
from dpsyngen.audit.findings import Finding
from dpsyngen.audit.one_run import OneRun


@dataclass
class AuditReport:
    """Everything about one audit of one run.  Private.

    Attributes:
        run: name of the run directory.
        epsilon: what the run claims, at `delta`; infinite without privacy.
        delta: δ.
        confidence: with which a correct installation passes everything, at least; and of each lower bound.
        parts: findings, by what was audited.
        notes: what a reader must know, such as why something was left out.
        step_game: the step-level audit, if there is a mechanism.
        one_runs: the one-run audits, by network.
        seconds: how long it took.
    """

    run: str
    epsilon: float
    delta: float
    confidence: float
    parts: dict[str, list[Finding]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    step_game: StepGame | None = None
    one_runs: dict[str, OneRun] = field(default_factory=dict)
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
        out: dict[str, Any] = {
            "run": self.run,
            "epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon,
            "delta": self.delta,
            "passed": self.passed,
            "confidence": self.confidence,
            "seconds": round(self.seconds, 1),
            "notes": self.notes,
            "findings": [{"part": part, **f.to_dict()} for part, of in self.parts.items() for f in of],
        }
        if (g := self.step_game) is not None:
            lower, claimed = g.epsilon(self.delta)
            out["step"] = {
                "trials": g.trials,
                "group": g.group,
                "false_alarm_rate": g.false_alarm_rate,
                "miss_rate": g.miss_rate,
                "mu_lower": g.mu_lower,
                "mu_claimed": g.mu_claimed,
                "epsilon_lower": lower,
                "epsilon_claimed": claimed,
                "noise_ratio": [r if math.isfinite(r) else None for r in g.noise_ratio],
                "confidence": g.confidence,
            }
        out["one_run"] = {
            name: {
                "canaries": o.canaries,
                "guesses": o.guesses,
                "correct": o.correct,
                "delta": o.delta,
                "epsilon_lower": o.epsilon_lower,
                "epsilon_claimed": o.epsilon_claimed,
                "confidence": o.confidence,
            }
            for name, o in self.one_runs.items()
        }
        return out

    def bounds(self) -> list[tuple[str, float, float, float]]:
        """(what, lower bound on ε, claimed ε, δ) of each attack."""
        out = []
        if self.step_game is not None:
            out.append(("one step, worst-case record", *self.step_game.epsilon(self.delta), self.delta))
        out += [(f"training, {name}", o.epsilon_lower, o.epsilon_claimed, o.delta) for name, o in self.one_runs.items()]
        return out

    def lines(self) -> Iterator[str]:
        """The table that the command line prints."""
        if self.bounds():
            yield f"{'attack':<44} {'lower bound':>12}    {'claimed':>9}   δ"
            for what, lower, claimed, delta in self.bounds():
                sign = "≤" if lower <= claimed else ">"
                yield f"{what:<44} ε ≥ {lower:>8.4f}  {sign} {claimed:>9.4f}   {delta:.3g}"
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
        yield self._chance()
        yield self.verdict()

    def _chance(self) -> str:
        levels = [f.level for of in self.parts.values() for f in of if f.p_value is not None]
        return (
            f"{len(levels)} tests, which fail below p = {levels[0]:.2g}: at most 1 correct installation in "
            f"{round(1 / (1 - self.confidence)):,} fails any of them by chance."
            if levels
            else "No test with an element of chance was made."
        )

    def verdict(self) -> str:
        """The last line."""
        if self.passed:
            return (
                f"No audit contradicts the claim.  Lower bounds hold with confidence {self.confidence:.6g} each; "
                "passing proves no upper bound."
            )
        names = "; ".join(dict.fromkeys(f.name for _, f in self.failures))
        return f"The claim is CONTRADICTED: {names}.  " + (
            "That can be chance: audit the run again, and if that fails too do not release it."
            if all(f.p_value is not None for _, f in self.failures)
            else "This is no matter of chance: do not release the run."
        )
