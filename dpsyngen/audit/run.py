"""The audit of a finished run: its books, its mechanism, and short runs of the same code on images of programs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.audit.canaries import CHECKPOINT_EVERY, CanaryPlan, train_canaries
from dpsyngen.audit.invariants import check_sizes
from dpsyngen.audit.report import AuditReport, Bound, Finding, decide
from dpsyngen.audit.sensitivity import audit_clipping, audit_noise
from dpsyngen.diffusion.stages import GAUSSIAN
from dpsyngen.errors import require
from dpsyngen.files import write_json
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.generator.files import read_description
from dpsyngen.hardware import choose
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness, poisson_sample
from dpsyngen.training.log import JsonLines
from dpsyngen.training.moments import charged_moments, load_gaussian
from dpsyngen.training.plan import MomentsPlan, Shape, stages_of
from dpsyngen.training.private import DpSgd, charged_mechanisms, charged_steps
from dpsyngen.training.run import Run
from dpsyngen.training.session import pinned


@dataclass(frozen=True)
class Effort:
    """How much to do: trials of the step-level game, and canaries and steps of the short trainings."""

    trials: int = 20_000
    canaries: int = 24
    steps: int = 24
    lookup_canaries: int = 8000
    lookup_steps: int = 40
    sparse_steps: int = 60


FULL = Effort()
QUICK = Effort(canaries=16, steps=10, lookup_canaries=1500, lookup_steps=24, sparse_steps=40)


@ordinary_modes()
def audit_run(
    run: Run,
    *,
    effort: Effort = FULL,
    confidence: float = 0.999,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda line: None,
) -> AuditReport:
    """Audit a finished run.  No private image is touched, so it costs no privacy; the results are private all the same.

    Args:
        effort: FULL (about two minutes on two cores for small networks) or QUICK (20 seconds).
        confidence: a correct installation passes all tests together with this probability, at least; each lower bound
            on ε holds with it, too.  From 0.95 to below 1.

    Returns:
        the report, which is also in ``private/audit/audit.json``.
    """
    require(0.95 <= confidence < 1, "--confidence", confidence, "from 0.95 to below 1")
    run.require_complete()
    device = choose(device).device
    begun = time.monotonic()
    ledger = Ledger(run.ledger_path)
    report = AuditReport(run.path.resolve().name, ledger.epsilon(), ledger.delta, confidence)
    on_progress("replaying the run's books")
    report.parts["this run's books"] = replay(run)
    if not Randomness.load(run.randomness_path).secure:
        report.notes.append(
            "NOT PRIVATE: this run's noise comes from --insecure-seed, so anyone can subtract it.  The audits are of "
            "the code and the settings, with unpredictable noise."
        )
    if math.isinf(config_epsilon := run.config.privacy.epsilon):
        report.notes.append(
            "NOT PRIVATE: this run was trained with ε = ∞, so there is no clipping, no noise and no claim to audit.  "
            "Only its sampling was looked at."
        )
    elif not charged_mechanisms(ledger):
        report.notes.append(
            "This run has no DP-SGD steps, so there is none to attack.  DP moments are one Gaussian mechanism a query; "
            "only their charges were looked at."
        )
    else:
        _audit_mechanism(run, ledger, report, effort, device, on_progress)
        report.notes.append(
            f"Audits of training are of short runs at the same target ε = {config_epsilon:g}, on images of programs."
        )
        if charged_moments(ledger):
            report.notes.append(
                "DP-SGD was attacked; of the DP moments only the charges were looked at.  The short runs train the "
                "network without them, and spend all of ε on their steps."
            )
    # All tests of all parts share the chance of a false alarm.
    judged = iter(decide([f for findings in report.parts.values() for f in findings], 1 - confidence))
    report.parts = {part: [next(judged) for _ in findings] for part, findings in report.parts.items()}
    report.seconds = time.monotonic() - begun
    folder = run.private / "audit"
    folder.mkdir(mode=0o700, exist_ok=True)
    write_json(folder / "audit.json", report.to_dict(), 0o600)
    return report


def _audit_mechanism(
    run: Run, ledger: Ledger, report: AuditReport, effort: Effort, device: str, tell: Callable[[str], None]
) -> None:
    config, shape = run.config, _shape(run)
    noise = {m.noise_multiplier for m in charged_mechanisms(ledger)}
    m = DpSgd(shape.records, min(noise), config.privacy.clipping_norm, config.private)
    tell("telling a step with a worst-case record from one without")
    game = audit_noise(config, m, trials=effort.trials, confidence=report.confidence)
    report.parts["one step with the run's settings"] = [game.finding]
    report.bounds, report.step = [game.bound(report.delta)], game.to_dict(report.delta)
    tell("clipping hostile images")
    moments = stages_of(config).moments
    gaussian = load_gaussian(run.weights(GAUSSIAN), shape).to(device) if moments else None  # released: costs nothing
    report.parts["clipping on the run's network"] = audit_clipping(config, m, shape, device, gaussian)
    images: dict[str, Any] = {"resolution": shape.resolution, "channels": shape.channels}
    images["classes"] = bool(shape.class_names)
    count, lookups, crash = effort.canaries, effort.lookup_canaries, CHECKPOINT_EVERY + 2
    attacked: dict[str, Any] = {"lookup": True, "crash_after": crash, "score": True}
    own = CanaryPlan(count, 8, (count + 8) // 2, effort.steps, crash_after=crash, **images)
    lookup = CanaryPlan(lookups, 16, (lookups + 16) // 2, effort.lookup_steps, **attacked)
    sparse = CanaryPlan(24, 16, 1, effort.sparse_steps, lookup=True)
    plans = {
        "a short run of the run's network": own,
        "a short run of the lookup network": lookup,
        "a run of batches that are often empty": sparse,
    }
    with tempfile.TemporaryDirectory(prefix="dpsyngen-audit-") as folder:
        for number, (name, plan) in enumerate(plans.items()):
            tell(f"training {name}: {plan.canaries} canaries, {plan.steps} steps")
            where = Path(folder) / str(number)
            found, o = train_canaries(config, plan, where, confidence=report.confidence, device=device)
            report.parts[name] = found
            if o is not None:
                found.append(o.finding)
                report.bounds.append(Bound("training, lookup network", o.epsilon_lower, o.epsilon_claimed, o.delta))
                report.one_run = o.to_dict()


def _shape(run: Run) -> Shape:
    about, _ = read_description(run.release)
    records = run.config.data.records or pinned(run.data_path)["records"]
    return Shape(about.resolution, about.channels, tuple(about.class_names), records)


def replay(run: Run) -> list[Finding]:
    """Compare the log of a run with its ledger and with what its key, its rate and its records say, without images."""
    config, ledger = run.config, Ledger(run.ledger_path)
    stages = stages_of(config)
    findings = [_moments(run, ledger)] if stages.moments else []
    if stages.gaussian:
        return findings
    phase = stages.private.name
    log = [v for v in JsonLines(run.private / "training.jsonl", 0o600).read() if v["phase"] == phase]
    steps = [int(v["step"]) for v in log]
    sizes = np.array([int(v["examples"]) for v in log], dtype=np.int64)
    records, charged = pinned(run.data_path)["records"], charged_steps(ledger)
    declared = config.data.records or records
    asked = config.private.batch / declared
    rates = {m.sampling_rate for m in charged_mechanisms(ledger)} or {asked}
    findings += [
        Finding(
            "steps logged are the steps charged",
            steps == list(range(1, charged + 1)),
            f"{len(steps)} steps in the log",
            f"{charged} steps in the ledger, each once and in order",
        ),
        Finding(
            "the ledger charges the rate that the run was asked for",
            len(rates) == 1 and math.isclose(max(rates), asked, rel_tol=1e-12),
            f"rate {max(rates):.6g} in the ledger",
            f"{config.private.batch} of {declared:,} records, {asked:.6g}",
        ),
    ]
    if not log:
        return findings
    rate, randomness = max(rates), Randomness.load(run.randomness_path)
    wrong = [s for s, b in zip(steps, sizes, strict=True) if b != len(poisson_sample(randomness, s - 1, records, rate))]
    findings.append(
        Finding(
            "each batch is the Poisson sample that the run's key gives",
            not wrong,
            f"{len(wrong)} of {len(steps)} batches have another size",
            "none",
            f"steps {wrong[:5]}" if wrong else "",
        )
    )
    return findings + check_sizes(sizes, records, rate)


def _moments(run: Run, ledger: Ledger) -> Finding:
    """Each query of the DP moments is in the ledger, once, with the noise that was fixed at the start."""
    noises = pinned(run.data_path)["moments"]
    planned = [] if noises is None else list(MomentsPlan(*noises).mechanisms())
    wanted: list[Mechanism | None] = [m if m.noise_multiplier > 0 else None for m in planned]
    charged = charged_moments(ledger)

    def text(queries: list[Mechanism | None]) -> str:
        return ", ".join("no noise" if m is None else f"{m.noise_multiplier:.6g}" for m in queries) or "none"

    return Finding(
        "DP moments are charged once each, at the noise that was planned",
        bool(planned) and charged == wanted,
        f"noise multipliers in the ledger: {text(charged)}",
        f"planned at the start: {text(wanted)}",
    )
