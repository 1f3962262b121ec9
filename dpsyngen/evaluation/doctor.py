"""What is wrong with a run, and what to do: its files, its ledger, its health.  Reads no private image."""

from __future__ import annotations

import contextlib
import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote

from dpsyngen.errors import DpsyngenError, LedgerError, RunError
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.certificate import number
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import read_checkpoints
from dpsyngen.training.findings import Finding, by_severity
from dpsyngen.training.health import assess, damage, stopped_because, write_health
from dpsyngen.training.log import JsonLines
from dpsyngen.training.run import Run
from dpsyngen.training.session import computed_with


@dataclass(frozen=True)
class Diagnosis:
    """What was found.  **Private** where a finding's basis is.

    Attributes:
        state: (what, how it stands) for people.
        findings: by severity.
    """

    state: list[tuple[str, str]]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return all(f.severity != "error" for f in self.findings)


def diagnose(run: Run, device: str = "cpu") -> Diagnosis:
    """Everything that `dpsyngen doctor` says: state of the files, ledger, health.

    Whatever is damaged becomes a finding.  The findings are kept in ``private/health.json`` unless another process
    works on the run.
    """
    state: list[tuple[str, str]] = []
    findings: list[Finding] = []
    busy = run.busy
    state.append(("run", _progress(run, busy)))
    findings += _of_files(run, state)
    if not _begun(run):
        state.append(("ledger", "none yet; nothing was spent"))
        return Diagnosis(state, by_severity(findings))
    pins = computed_with(run.engine_path)
    if pins is not None:
        layout = ", channels last" if pins.get("channels_last") else ""
        state.append(("computed with", f"DP-SGD steps on {pins.get('device')} in {pins.get('precision')}{layout}"))
    try:
        ledger = Ledger(run.ledger_path)
        state.append(("ledger", _spent(ledger)))
    except LedgerError as error:
        state.append(("ledger", "DAMAGED"))
        findings.append(damage("ledger-damaged", str(error), "no ε can be stated, so nothing may be released"))
    try:
        findings += assess(run, lambda release: ReleasedGenerator(release, device))
    except LedgerError:
        pass  # said above
    except DpsyngenError as error:
        findings.append(damage("run-damaged", str(error), "the run can neither be judged nor continued"))
    findings = by_severity(findings)
    if not busy:
        # On a disk that cannot be written, looking must still do.
        with contextlib.suppress(RunError, OSError), run.lock():
            write_health(run, findings)
    return Diagnosis(state, findings)


# ------------------------------------------------------------------------------------------------- state


def _begun(run: Run) -> bool:
    """Whether a training was ever set up here: its key is written before its ledger."""
    return run.complete or run.randomness_path.exists() or run.ledger_path.exists()


def _progress(run: Run, busy: bool) -> str:
    if busy:
        return "another process is working on it; what follows is as of now"
    if run.complete:
        return "finished"
    if stopped_because(run.private) is not None:
        return "stopped, because its network could not compute any more; it cannot be continued"
    return f"interrupted; continue with: dpsyngen train --resume --out {quote(str(run.path))}"


def _spent(ledger: Ledger) -> str:
    target = "no target" if math.isinf(ledger.target_epsilon) else f"target {ledger.target_epsilon:g}"
    epsilon = ledger.epsilon()
    bound = f"ε = {number(epsilon, 5, up=True)} at δ = {ledger.delta:.3g} so far"
    spent = "NOT PRIVATE (ε = ∞)" if math.isinf(epsilon) else bound
    return f"whole, {len(ledger.entries)} entries; {spent} ({target})"


def _warning(code: str, seen: str, why: str, change: str) -> Finding:
    return Finding(code, "warning", seen, why, change, "released")


def _of_files(run: Run, state: list[tuple[str, str]]) -> Iterator[Finding]:
    """Checkpoints, the small files of the private half, and who may read it."""
    good, bad = read_checkpoints(run.private)
    if not run.complete:
        text = "none; phases start anew"
        if good:
            text = f"phase {good[0].phase!r}, step {good[0].step:,} ({good[0].path.name})"
        state.append(("last checkpoint", text))
    for what in bad:
        place = "the other one" if good else "the beginning of the phase"
        why = f"the run goes on from {place}, with the same steps and the same noise"
        yield _warning("checkpoint-damaged", f"a checkpoint cannot be read: {what}", why, "nothing; check the disk")
    files = (("the secret random key", run.randomness_path), ("the identity of the images", run.data_path))
    for what, path in files if _begun(run) else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = "the run cannot be continued, and not checked for memorisation; a finished release is not touched"
            yield damage("file-damaged", f"{path.name}, {what}, cannot be read: {error}", why)
    for path in (run.private / "training.jsonl", run.release / "public_training.jsonl"):
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        lost = lines - len(JsonLines(path, 0o600).read()) if lines else 0
        if lost > 0:
            why = "nothing rests on this log but the curves and this diagnosis"
            seen = f"{lost} of {lines} lines of {path.name} cannot be read"
            yield _warning("log-damaged", seen, why, "nothing; check the disk")
    mode = stat.S_IMODE(run.private.stat().st_mode)
    if mode & 0o077:
        seen = f"{run.private} has mode {mode:04o}, so others on this machine may read it"
        why = "it holds the key of the noise and figures of private images"
        yield _warning("private-half-open", seen, why, f"chmod 700 {run.private}")
