"""A finished run against its own books: the batches it logged are those that its key, its rate and its ledger give.

Nothing is computed on images.  It catches, in the run itself, shuffled batches, another rate than the one accounted
for, empty batches that were left out, steps too many, and streams that were used twice.
"""

from __future__ import annotations

import json
import math

import numpy as np

from dpsyngen.audit.findings import Finding, exact
from dpsyngen.audit.inclusions import check_sizes
from dpsyngen.errors import RunError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.privacy.sampling import poisson_sample
from dpsyngen.training.moments import MomentsPlan
from dpsyngen.training.moments_phase import charged_moments
from dpsyngen.training.pinned import pinned
from dpsyngen.training.plan import stages_of
from dpsyngen.training.private import charged_mechanisms, charged_steps
from dpsyngen.training.run import JsonLines, Run


def records_present(run: Run) -> int:
    """How many images the run had."""
    try:
        return int(json.loads(run.data_path.read_text(encoding="utf-8"))["records"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run.data_path} cannot be read: {error}.  Without it the run cannot be audited.") from None


def _moments(run: Run, ledger: Ledger) -> Finding:
    """Each query of the DP moments is in the ledger, once, with the noise that was fixed at the start."""
    known = pinned(run)
    noises = None if known is None else known["moments"]
    planned = [] if noises is None else list(MomentsPlan(*noises).mechanisms())
    wanted: list[Mechanism | None] = [m if m.noise_multiplier > 0 else None for m in planned]
    charged = charged_moments(ledger)

    def text(queries: list[Mechanism | None]) -> str:
        return ", ".join("no noise" if m is None else f"{m.noise_multiplier:.6g}" for m in queries) or "none"

    return exact(
        "DP moments are charged once each, at the noise that was planned",
        bool(planned) and charged == wanted,
        f"noise multipliers in the ledger: {text(charged)}",
        f"planned at the start: {text(wanted)}",
    )


def replay(run: Run) -> list[Finding]:
    """Compare the log of a run with its ledger and with what its key says.

    Returns:
        exact findings, and tests that wait for :func:`dpsyngen.audit.findings.decide`.
    """
    config, ledger = run.config, Ledger(run.ledger_path)
    stages = stages_of(config)
    findings = [_moments(run, ledger)] if stages.moments else []
    if stages.gaussian:
        return findings
    phase = stages.private.name
    log = [v for v in JsonLines(run.private / "training.jsonl", 0o600).read() if v["phase"] == phase]
    steps = [int(v["step"]) for v in log]
    sizes = np.array([int(v["examples"]) for v in log], dtype=np.int64)
    records, charged = records_present(run), charged_steps(ledger)
    declared = config.data.records or records
    asked = config.private.batch / declared
    rates = {m.sampling_rate for m in charged_mechanisms(ledger)} or {asked}
    findings += [
        exact(
            "steps logged are the steps charged",
            steps == list(range(1, charged + 1)),
            f"{len(steps)} steps in the log",
            f"{charged} steps in the ledger, each once and in order",
        ),
        exact(
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
        exact(
            "each batch is the Poisson sample that the run's key gives",
            not wrong,
            f"{len(wrong)} of {len(steps)} batches have another size",
            "none",
            f"steps {wrong[:5]}" if wrong else "",
        )
    )
    return findings + check_sizes(sizes, records, rate)
