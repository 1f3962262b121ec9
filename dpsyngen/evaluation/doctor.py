"""What is the matter with a run, and what to do: its state, its ledger, its health.  Reads no private image."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpsyngen.config import Config
from dpsyngen.errors import DpsyngenError, LedgerError, RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import describe_checkpoints
from dpsyngen.training.engine_settings import computed_with
from dpsyngen.training.finite import stopped_because
from dpsyngen.training.health import Finding, by_severity, of_losses
from dpsyngen.training.health_images import of_images
from dpsyngen.training.health_private import Facts, of_private_training
from dpsyngen.training.plan import stages_of
from dpsyngen.training.private import QUERY
from dpsyngen.training.run import JsonLines, Run

_EACH, _CLASSES, _UNLABELLED = 8, 10, 64  # generated images looked at: of a class, classes, or in all
_SAMPLER_STEPS = 20  # at most, so that looking takes seconds


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


def assess(run: Run, device: str = "cpu") -> list[Finding]:
    """Findings about the training and the generated images of a run, finished or not, by severity.

    It reads logs, settings, weights and the ledger, and draws a few images; the run is not changed.

    Raises:
        RunError: the configuration cannot be read.
        LedgerError: the ledger is damaged.
    """
    out: list[Finding] = []
    stopped = stopped_because(run.private)
    if stopped is not None:
        out.append(stopped)
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in _whole(JsonLines(run.release / "public_training.jsonl", 0o644).read(), "loss"):
        phases.setdefault(line["phase"], []).append(line)
    for name, lines in phases.items():
        out += of_losses(lines, name, "--set public.learning_rate=…", "released")
    ledger, stages = Ledger(run.ledger_path), stages_of(run.config)
    if not stages.gaussian:
        facts = _facts(run, run.config, ledger)
        log = JsonLines(run.private / "training.jsonl", 0o600).read()
        out += of_private_training(_whole(log, "loss", "examples", "clipped", "median_norm", "not_finite"), facts)
    if run.complete:
        found = _of_generator(run, device)
        out += [_without_network(f) for f in found] if stages.gaussian else found
    return by_severity(out)


def _without_network(f: Finding) -> Finding:
    """What to do about images where there is no network that could be trained otherwise."""
    if f.basis != "released" or f.code == "release-damaged":
        return f
    return replace(
        f,
        why="the images come from DP moments alone, so that is what these say: noise hides the rest, or the images "
        "have little in common",
        change="raise --epsilon, use more images, or choose a variant with a network (residual)",
    )


def write_health(run: Run, device: str = "cpu") -> list[Finding]:
    """:func:`assess` a run and keep the findings in ``private/health.json``."""
    findings = assess(run, device)
    _keep(run, findings)
    return findings


def diagnose(run: Run, device: str = "cpu") -> Diagnosis:
    """Everything that `dpsyngen doctor` says: state of the files, ledger, health.

    Whatever is damaged becomes a finding.  The findings are kept in ``private/health.json`` unless another process
    works on the run.
    """
    state: list[tuple[str, str]] = []
    findings: list[Finding] = []
    busy = _locked(run)
    state.append(("run", _progress(run, busy)))
    findings += _of_files(run, state)
    if not _begun(run):
        state.append(("ledger", "none yet; nothing was spent"))
        return Diagnosis(state, by_severity(findings))
    pins = computed_with(run)
    if pins is not None:
        state.append(("computed with", _computed(pins)))
    try:
        ledger = Ledger(run.ledger_path)
        state.append(("ledger", _spent(ledger)))
    except LedgerError as error:
        state.append(("ledger", "DAMAGED"))
        findings.append(_damage("ledger-damaged", str(error), "no ε can be stated, so nothing may be released"))
    try:
        findings += assess(run, device)
    except LedgerError:
        pass  # said above
    except DpsyngenError as error:
        findings.append(_damage("run-damaged", str(error), "the run can neither be judged nor continued"))
    findings = by_severity(findings)
    if not busy:
        # On a disk that cannot be written, looking must still do.
        with contextlib.suppress(RunError, OSError), run.lock():
            _keep(run, findings)
    return Diagnosis(state, findings)


def _keep(run: Run, findings: list[Finding]) -> None:
    kept = {
        "private": "findings with basis 'private' rest on figures of private images: publishing them costs privacy",
        "findings": [f.to_dict() for f in findings],
    }
    write_text(run.private / "health.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n", 0o600)


# ------------------------------------------------------------------------------------------------ health


def _whole(log: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Lines that have numbers under all of `keys`; a damaged log must not hide what the rest of it says."""
    return [v for v in log if all(isinstance(v.get(k), int | float) for k in keys)]


def _facts(run: Run, config: Config, ledger: Ledger) -> Facts:
    c, stages = config.private, stages_of(config)
    noise = [e.mechanism.noise_multiplier for e in ledger.entries if e.mechanism and e.details.get("query") == QUERY]
    return Facts(
        steps=c.steps,
        batch=c.batch,
        records=ledger.records,
        noise_multiplier=noise[0] if noise else 0.0,
        clipping_norm=config.privacy.clipping_norm,
        clipping=c.clipping,
        ema=c.ema,
        parameters=_parameters(run),
        pretrained=stages.pretrain,
        residual=stages.moments,
        complete=run.complete,
    )


def _parameters(run: Run) -> int:
    """Trainable numbers of the private network, from its weights or a checkpoint; 0 if there is neither."""
    from safetensors import SafetensorError, safe_open

    names = [(run.weights(n), "") for n in ("context", "shared")]
    names += [(run.private / n, "model/") for n, phase, _ in describe_checkpoints(run.private)[0] if phase == "context"]
    for path, prefix in names:
        if path.exists():
            try:
                with safe_open(path, framework="pt") as f:
                    shapes = [f.get_slice(k).get_shape() for k in f.keys() if k.startswith(prefix)]  # noqa: SIM118
                return sum(math.prod(shape) for shape in shapes)
            except (SafetensorError, OSError):
                continue
    return 0


def _of_generator(run: Run, device: str) -> list[Finding]:
    from dpsyngen.generator.generator import ReleasedGenerator
    from dpsyngen.training.health import tensors_finite

    try:
        generator = ReleasedGenerator(run.release, device)
    except RunError as error:
        return [_damage("release-damaged", str(error), "no image can be drawn from this release")]
    broken = [name for name, net in generator.networks.items() if not tensors_finite(net.state_dict().values())]
    if broken:
        return [
            Finding(
                "released-weights-not-finite",
                "error",
                f"weights of {', '.join(broken)} in the release are NaN, infinite or too large to compute with",
                "such a network draws nothing",
                "do not publish this release; train again with a lower --lr",
                "released",
            )
        ]
    classes = len(generator.class_names)
    labels = None
    if classes:
        chosen = np.unique(np.linspace(0, classes - 1, min(classes, _CLASSES)).astype(int)).tolist()
        labels = generator.labels(_EACH * len(chosen), chosen)
    count = _UNLABELLED if labels is None else len(labels)
    steps = min(int(generator.defaults["steps"]), _SAMPLER_STEPS)
    samples = generator.sample(count, labels=labels, steps=steps)
    return of_images(samples.images, samples.labels, generator.class_names)


# ------------------------------------------------------------------------------------------------- state


def _damage(code: str, seen: str, why: str) -> Finding:
    change = "put private/ and release/ back from one backup, or start a new run"
    return Finding(code, "error", seen.rstrip("."), why, change, "released")


def _begun(run: Run) -> bool:
    """Whether a training was ever set up here: its key is written before its ledger."""
    return run.complete or run.randomness_path.exists() or run.ledger_path.exists()


def _locked(run: Run) -> bool:
    """Whether another process works on the run."""
    try:
        fd = os.open(run.private / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _progress(run: Run, busy: bool) -> str:
    if busy:
        return "another process is working on it; what follows is as of now"
    if run.complete:
        return "finished"
    if stopped_because(run.private) is not None:
        return "stopped, because its network could not compute any more; it cannot be continued"
    return f"interrupted; continue with: dpsyngen train --resume --out {run.path}"


def _computed(pins: dict[str, Any]) -> str:
    layout = ", channels last" if pins.get("channels_last") else ""
    return f"DP-SGD steps on {pins.get('device')} in {pins.get('precision')}{layout}"


def _spent(ledger: Ledger) -> str:
    target = "no target" if math.isinf(ledger.target_epsilon) else f"target {ledger.target_epsilon:g}"
    epsilon = ledger.epsilon()
    spent = "NOT PRIVATE (ε = ∞)" if math.isinf(epsilon) else f"ε = {epsilon:.4f} at δ = {ledger.delta:.3g} so far"
    return f"whole, {len(ledger.entries)} entries; {spent} ({target})"


def _of_files(run: Run, state: list[tuple[str, str]]) -> list[Finding]:
    """Checkpoints, the small files of the private half, and who may read it."""
    out: list[Finding] = []
    good, bad = describe_checkpoints(run.private)
    if not run.complete:
        text = f"phase {good[0][1]!r}, step {good[0][2]:,} ({good[0][0]})" if good else "none; phases start anew"
        state.append(("last checkpoint", text))
    for what in bad:
        out.append(
            Finding(
                "checkpoint-damaged",
                "warning",
                f"a checkpoint cannot be read: {what}",
                "the run goes on from "
                + ("the other one" if good else "the beginning of the phase")
                + ", with the same steps and the same noise",
                "nothing; check the disk",
                "released",
            )
        )
    files = (("the secret random key", run.randomness_path), ("the identity of the images", run.data_path))
    for what, path in files if _begun(run) else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = "the run cannot be continued, and not checked for memorisation; a finished release is not touched"
            out.append(_damage("file-damaged", f"{path.name}, {what}, cannot be read: {error}", why))
    for path in (run.private / "training.jsonl", run.release / "public_training.jsonl"):
        if path.exists():
            lines, read_lines = path.read_bytes().count(b"\n"), len(JsonLines(path, 0o600).read())
            if read_lines < lines:
                out.append(
                    Finding(
                        "log-damaged",
                        "warning",
                        f"{lines - read_lines} of {lines} lines of {path.name} cannot be read",
                        "nothing rests on this log but the curves and this diagnosis",
                        "nothing; check the disk",
                        "released",
                    )
                )
    mode = stat.S_IMODE(run.private.stat().st_mode)
    if mode & 0o077:
        out.append(
            Finding(
                "private-half-open",
                "warning",
                f"{run.private} has mode {mode:04o}, so others on this machine may read it",
                "it holds the key of the noise and figures of private images",
                f"chmod 700 {run.private}",
                "released",
            )
        )
    return out
