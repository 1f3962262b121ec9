"""Watching a run from another process, and commands of the command line that outlive the process that started them.

What is known of a training comes from its own files, and from what the command said, so a run that was started in a
terminal looks the same, and can be stopped and continued from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any, Literal

from dpsyngen.config import Config
from dpsyngen.errors import LedgerError, RunError
from dpsyngen.files import write_text
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
    config, found = run.config, list[Phase]()
    for path, steps, private in (
        (run.release / "public_training.jsonl", config.public.steps, False),
        (run.private / "training.jsonl", config.private.steps, True),
    ):
        logs: dict[str, list[dict[str, Any]]] = {}
        for line in JsonLines(path, 0o600).read():
            logs.setdefault(line["phase"], []).append(line)
        found += [Phase(name, log[-1]["step"], steps, private, log) for name, log in logs.items()]
    return found


def _seconds_left(run: Run, now: Phase) -> float | None:
    times = [v["seconds"] for v in JsonLines(run.private / CLOCK, 0o600).read() if v["phase"] == now.name][-_RECENT:]
    return sum(times) / len(times) * (now.steps - now.done) if times else None


def _spent(run: Run) -> tuple[float | None, float | None, float | None]:
    try:
        ledger = Ledger(run.ledger_path)
    except LedgerError:
        return None, None, None  # not there yet, or a line is being written; damage is for `dpsyngen doctor`
    return ledger.epsilon(), ledger.delta, ledger.target_epsilon


def worker(run: Path) -> int | None:
    """The process, of this user and on this machine, that works on the run directory `run`; None if none is known.

    By Linux's list of locks of each open file, so none is known where a sandbox leaves that out.
    """
    lock = os.path.realpath(run / "private" / LOCK)
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        number = fd.parts[2]
        try:
            # Others have the file open to look or to wait; the holder's line is "lock: 1: FLOCK ADVISORY WRITE pid …".
            about = (fd.parents[1] / "fdinfo" / fd.name).read_text() if os.readlink(fd) == lock else ""
        except OSError:
            continue  # ended meanwhile, or another user's
        if f" WRITE {number} " in about and int(number) != os.getpid():
            return int(number)
    return None


# ---------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Said:
    """Whether a command goes on, what it said, in lines without private figures, and the error that it ended with."""

    going: bool
    lines: list[str]
    error: str | None


class Jobs:
    """The commands; `folder` is for what a training says, whose run directory is not yet there when it begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: dict[Path, subprocess.Popen[bytes]] = {}

    def train(self, path: Path, config: Config | None = None) -> None:
        """Start a training of the run at `path`, or without `config` go on with it; RunError if one goes on."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        words, file = ["--resume"], self.folder / f"{path.name}.yaml"
        if config is not None:
            write_text(file, config.to_yaml(), 0o600)
            words = ["--config", str(file)]
        self._start(self._log(path), "train", "--out", str(path), "--log-format", "json", "--json", *words)

    def start(self, run: Run, command: str, *arguments: str) -> None:
        """Start another command on a finished run; what it says stays in its private half."""
        self._start(run.private / f"studio-{command}.log", command, str(run.path), "--json", *arguments)

    def _start(self, log: Path, *arguments: str) -> None:
        if self._goes_on(log):
            raise RunError("this is going on already, perhaps from another tab.")
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), "wb") as output:
            command = [sys.executable, "-m", "dpsyngen", *arguments]
            # In a session of its own: Ctrl-C in a terminal and its end are not for it.
            self._started[log] = subprocess.Popen(
                command, stdin=DEVNULL, stdout=output, stderr=STDOUT, start_new_session=True
            )

    def _goes_on(self, log: Path) -> bool:
        return log in self._started and self._started[log].poll() is None

    def _log(self, path: Path) -> Path:
        return self.folder / f"{path.name}.log"

    def stop(self, path: Path) -> None:
        """Ask the training at `path`, whoever started it, to stop after the current step, as Ctrl-C does.

        RunError if it is not known which process that is.
        """
        log = self._log(path)
        number = worker(path) or (self._started[log].pid if self._goes_on(log) else None)
        if number is None:
            raise RunError("no training of this run is known on this machine: it has just ended, or runs elsewhere.")
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGINT)

    def look(self, path: Path) -> tuple[Said, Progress | None]:
        """What the training at `path` said, and how the run stands; None if there is no run directory (yet)."""
        said = self._said(self._log(path))
        return said, progress_of(Run(path)) if (path / "run.json").exists() else None

    def doing(self, run: Run, command: str) -> Said:
        """What a command of :meth:`start` said."""
        return self._said(run.private / f"studio-{command}.log")

    def _said(self, log: Path) -> Said:
        going, lines, error = self._goes_on(log), list[str](), None
        with contextlib.suppress(OSError):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    told = json.loads(line)
                except (ValueError, RecursionError):
                    told = {"message": line}
                failed = told.get("error") if isinstance(told, dict) else None
                if isinstance(failed, dict):
                    error = None if failed.get("kind") == "interrupted" else str(failed.get("message"))
                elif isinstance(told, dict) and told.get("event") != "error" and told.get("message"):
                    lines.append(str(told["message"]))
        return Said(going, lines, error)
