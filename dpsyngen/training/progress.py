"""How far a run is, by its own files, for whoever watches it from another process; nothing is locked or changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dpsyngen.errors import LedgerError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.health import stopped_because
from dpsyngen.training.log import CLOCK, PREVIEW, JsonLines
from dpsyngen.training.run import LOCK, Run

State = Literal["training", "interrupted", "stopped for good", "finished"]
_RECENT = 20  # steps that the time left is judged by


@dataclass(frozen=True)
class Phase:
    """A phase that has begun: how many of its steps are done, and the lines of its log; private where `private`."""

    name: str
    done: int
    steps: int
    private: bool
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """How a run stands now.

    Attributes:
        state: "training" while some process works on an unfinished run.
        phases: those that write a log and have begun.
        seconds_left: of the last of them, while it goes on; None: not known.
        epsilon, delta, target: ε spent so far, δ, and the ε that was planned; None while there is no ledger.
        preview: the last picture of what is drawn (the setting ``logging.pictures``).  Private until the release.
    """

    state: State
    phases: list[Phase]
    seconds_left: float | None
    epsilon: float | None
    delta: float | None
    target: float | None
    preview: Path | None


def progress_of(run: Run) -> Progress:
    """How `run` stands; RunError if its configuration is damaged."""
    state: State = "interrupted" if stopped_because(run.private) is None else "stopped for good"
    if run.busy:
        state = "training"
    if run.complete:
        state = "finished"
    phases = _phases(run)
    preview = run.private / PREVIEW
    left = _seconds_left(run, phases[-1]) if state == "training" and phases else None
    return Progress(state, phases, left, *_spent(run), preview if preview.exists() else None)


def _phases(run: Run) -> list[Phase]:
    config, found = run.config, dict[str, Phase]()
    for path, steps, private in (
        (run.release / "public_training.jsonl", config.public.steps, False),
        (run.private / "training.jsonl", config.private.steps, True),
    ):
        for line in JsonLines(path, 0o600).read():
            name = line["phase"]
            log = found[name].log if name in found else []
            log.append(line)
            found[name] = Phase(name, line["step"], steps, private, log)
    return list(found.values())


def _seconds_left(run: Run, now: Phase) -> float | None:
    times = [v["seconds"] for v in JsonLines(run.private / CLOCK, 0o600).read() if v["phase"] == now.name][-_RECENT:]
    return sum(times) / len(times) * (now.steps - now.done) if times else None


def _spent(run: Run) -> tuple[float | None, float | None, float | None]:
    try:
        ledger = Ledger(run.ledger_path)
    except LedgerError:
        return None, None, None  # not there yet, or a line is being written; damage is for `dpsyngen doctor`
    return _epsilon(run.ledger_path, ledger.head.digest), ledger.delta, ledger.target_epsilon


@lru_cache(maxsize=64)
def _epsilon(path: Path, digest: str) -> float:
    return Ledger(path).epsilon()


def worker(run: Path) -> int | None:
    """The process, of this user and on this machine, that works on the run directory `run`; None if none is known."""
    lock = os.path.realpath(run / "private" / LOCK)
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == lock and int(fd.parts[2]) != os.getpid():
                return int(fd.parts[2])
        except OSError:
            continue  # ended meanwhile, or another user's
    return None
