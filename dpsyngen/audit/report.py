"""What an audit found: a finding for each property, lower bounds on ε, for a program, a person and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import require
from dpsyngen.files import write_text

_COLOURS = {"public": "#2a9d8f", "private": "#d1495b"}


@dataclass(frozen=True)
class Finding:
    """One property that was checked."""

    name: str
    passed: bool
    statistic: str  # what was measured
    null: str  # what the statistic is if the property holds: a distribution or an exact value
    p_value: float | None = None  # None for a property that holds exactly or not at all
    level: float = 0.0  # the p-value below which the finding fails; exact properties have no false alarms
    detail: str = ""  # more for a reader, such as where it failed


def by_p_value(name: str, statistic: str, null: str, p_value: float, detail: str = "") -> Finding:
    """A finding that :func:`decide` judges by its p-value."""
    return Finding(name, False, statistic, null, min(max(p_value, 0.0), 1.0), math.nan, detail)


def exact(name: str, passed: bool, statistic: str, null: str, detail: str = "") -> Finding:
    """A finding about a property that holds or does not; there is no chance in it."""
    return Finding(name, passed, statistic, null, None, 0.0, detail)


def decide(findings: Iterable[Finding], error: float) -> list[Finding]:
    """Judge the tests among the findings so that all of them together fail a correct mechanism with at most `error`."""
    require(0 < error < 1, "error", error, "in (0, 1)")
    findings = list(findings)
    # Bonferroni: each test gets the same share of the family-wise error, which needs no independence.
    level = error / max(sum(f.p_value is not None for f in findings), 1)
    return [f if f.p_value is None else replace(f, level=level, passed=f.p_value >= level) for f in findings]


class Attack(Protocol):
    """An attack with a lower bound on ε."""

    def bound(self, delta: float) -> tuple[float, float, float]:
        """Lower bound on ε, the claimed ε, and the δ of both: the given one, or the attack's own."""

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the attacker saw with the record and without it."""

    def to_dict(self, delta: float) -> dict[str, Any]:
        """For JSON: no infinities, no scores."""


@dataclass
class AuditReport:
    """Everything about one audit of one run.  Private."""

    run: str
    epsilon: float  # what the run claims; infinite without privacy
    delta: float
    confidence: float  # with which a correct installation passes everything, at least; and of each lower bound
    parts: dict[str, list[Finding]] = field(default_factory=dict)  # by what was audited
    notes: list[str] = field(default_factory=list)  # what a reader must know, such as why something was left out
    step_game: Attack | None = None
    one_runs: dict[str, Attack] = field(default_factory=dict)  # by the network of the short training
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
            "findings": [{"part": part, **asdict(f)} for part, of in self.parts.items() for f in of],
        }
        if self.step_game is not None:
            out["step"] = self.step_game.to_dict(self.delta)
        return out | {"one_run": {name: attack.to_dict(self.delta) for name, attack in self.one_runs.items()}}

    def bounds(self) -> list[tuple[str, float, float, float]]:
        """(what, lower bound on ε, claimed ε, δ) of each attack."""
        named = [("one step, worst-case record", self.step_game)] if self.step_game is not None else []
        named += [(f"training, {name}", attack) for name, attack in self.one_runs.items()]
        return [(name, *attack.bound(self.delta)) for name, attack in named]

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


def write_audit_plot(report: AuditReport, path: Path) -> None:
    """Draw the attacks of an audit, at least one, as SVG; the file is private."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    attacks = {"one step": report.step_game} if report.step_game is not None else {}
    attacks |= report.one_runs
    buffer = io.StringIO()
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.2 * (1 + len(attacks)), 3.4), layout="tight")
        first, *panels = np.atleast_1d(figure.subplots(1, 1 + len(attacks)))
        _bounds(first, report)
        for panel, (name, attack) in zip(panels, attacks.items(), strict=True):
            _curve(panel, name, *attack.scores())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(path, buffer.getvalue(), 0o600)


def _bounds(panel: Any, report: AuditReport) -> None:
    bounds = report.bounds()
    places = np.arange(len(bounds))[::-1]
    for place, (_, lower, claimed, _) in zip(places, bounds, strict=True):
        panel.barh(place, lower, height=0.5, color=_COLOURS["public" if lower <= claimed else "private"])
        panel.plot([claimed, claimed], [place - 0.4, place + 0.4], color="#333", lw=2)
        panel.text(max(lower, claimed), place, f"  {lower:.2f}", va="center")
    panel.set_yticks(places, [what.replace(", ", ",\n") for what, *_ in bounds])
    label = f"ε: lower bound at confidence {report.confidence:g} (bar), claimed (line)"
    panel.set(xlim=(0, 1.25 * max(claimed for _, _, claimed, _ in bounds)), xlabel=label)


def _curve(panel: Any, name: str, with_it: NDArray[np.float64], without: NDArray[np.float64]) -> None:
    """Receiver operating characteristic, on logarithmic axes where attacks matter."""
    thresholds = np.sort(np.concatenate([with_it, without]))
    caught = 1 - np.searchsorted(np.sort(with_it), thresholds, side="right") / len(with_it)
    alarms = 1 - np.searchsorted(np.sort(without), thresholds, side="right") / len(without)
    panel.plot(alarms, caught, color=_COLOURS["private"], lw=1.5)
    low = 1 / len(without)
    diagonal = np.geomspace(low, 1, 50)
    panel.plot(diagonal, diagonal, color="#999", lw=1, ls="--")
    panel.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1.05))
    panel.set(title=name, xlabel="false alarms", ylabel="records recognised")
