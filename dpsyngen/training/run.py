"""The run directory: a private half that never leaves the room and a release half that is safe to publish.

::

    run.json      format version
    private/      mode 0700: ledger, random state, checkpoints, losses, private metrics, the full report
    release/      weights, generator.json, configuration, privacy statement, samples, the public report
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsyngen.config import Config, validate
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import number, read_yaml_file, remove_temporaries, strict_text, write_text
from dpsyngen.privacy.chain import Head
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.lock import Lock
from dpsyngen.training.new_run import LOCK, clear_stages, interrupted_start, make_folders, require_new
from dpsyngen.version import FORMAT, __version__


class Run:
    """One run directory.

    Args:
        path: an existing run directory (see :meth:`create`).
        lock: its lock, if the caller holds it already.

    Raises:
        RunError: not a run directory, or written in another format.
    """

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self.private, self.release = path / "private", path / "release"
        self._lock = lock or Lock(self.private / LOCK, path)
        if not path.is_dir():
            raise RunError(f"{path} is not a folder.  Give the folder that `dpsyngen train --out` made.")
        try:
            stamp = json.loads((path / "run.json").read_text())
            found = stamp["format"]
        except (OSError, ValueError, KeyError, TypeError):
            if interrupted_start(path):
                raise RunError(
                    f"{path} is not a run yet: it was stopped while it was being made, before anything was trained.  "
                    "Start it again, without --resume."
                ) from None
            raise RunError(
                f"{path} is not a run directory (no readable run.json).  Give the folder that "
                "`dpsyngen train --out` made."
            ) from None
        if found != FORMAT:
            raise RunError(
                f"{path} was written in run format {found} (dpsyngen {stamp.get('dpsyngen', '?')}), but this is "
                f"dpsyngen {__version__}, which reads format {FORMAT}.  Use the version that made it."
            )

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Make a run directory at `path` and hold its lock, until the run's :meth:`lock` context or its object ends.

        Raises:
            RunError: there is something at `path` already, or it cannot be written.
        """
        require_new(path)
        stamp = json.dumps({"format": FORMAT, "dpsyngen": __version__}) + "\n"
        return cls(path, make_folders(path, stamp, config.to_yaml()))

    @property
    def complete(self) -> bool:
        """Whether training has finished and the generator is released."""
        return (self.release / "generator.json").exists()

    @property
    def config(self) -> Config:
        """The full configuration of the run."""
        try:
            return validate(read_yaml_file(self.private / "config.yaml", "the configuration"))
        except ConfigError as error:
            raise RunError(f"the configuration of {self.path} cannot be used: {error}") from None

    @property
    def ledger_path(self) -> Path:
        return self.private / "ledger.jsonl"

    @property
    def randomness_path(self) -> Path:
        return self.private / "randomness.json"

    @property
    def data_path(self) -> Path:
        return self.private / "data.json"

    @property
    def engine_path(self) -> Path:
        return self.private / "engine.json"

    @property
    def features_path(self) -> Path:
        """Features of real images, kept by evaluations."""
        return self.private / "features"

    def weights(self, network: str) -> Path:
        """Where the released weights of `network` are."""
        return self.release / "weights" / f"{network}.safetensors"

    def require_complete(self) -> None:
        """Raise RunError unless training has finished."""
        if not self.complete:
            raise RunError(
                f"{self.path} is not finished: its training was interrupted.  Continue it with "
                f"`dpsyngen train --resume --out {self.path}`."
            )

    def finished_ledger(self) -> Ledger:
        """The ledger of a finished run, which must have all that it had at the release.

        Raises:
            LedgerError: it is damaged.
            RunError: it is of an earlier time than the release, so some charges are not in it.
        """
        ledger = Ledger(self.ledger_path)
        path = self.release / "privacy.json"
        try:
            head = Head(**json.loads(path.read_text(encoding="utf-8"))["ledger"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{path} is missing or damaged: {error!r}.  Put it back from a backup.") from None
        if not ledger.has_been(head):
            raise RunError(
                f"{self.ledger_path} is not the ledger with which {self.release} was released, or of an earlier time: "
                "what it lacks was charged all the same.  Put back all of private/ as it was after the training."
            )
        return ledger

    def open_for_writing(self) -> None:
        """Take the lock, for as long as this object lives, and clear away what killed processes left.

        Raises:
            RunError: another process works on the run, or it cannot be written.
        """
        if self._lock.acquire():
            self._tidy()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory alone; contexts of one object nest.

        Raises:
            RunError: another process works on the run, or it cannot be written.
        """
        with self._lock.held() as fresh:
            if fresh:
                self._tidy()
            yield

    def _tidy(self) -> None:
        clear_stages(self.path)
        released = (self.release, self.release / "weights", self.release / "denoiser")
        for folder in (self.path, self.private, self.features_path, *released):
            if folder.is_dir():
                remove_temporaries(folder)


class JsonLines:
    """A log of one JSON object a line, each with a phase and a step, that can be cut back when a run resumes.

    Nothing rests on it: what cannot be read in it is left out.  A number that JSON lacks, such as a loss that is not
    finite, is the word "inf", "-inf" or "nan" in the file, and a number again when it is read here.

    Args:
        path: the file; made on the first line.
        mode: permissions.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path, self.mode = path, mode

    def append(self, **values: Any) -> None:
        """Add a line."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self.mode)
        with os.fdopen(fd, "w") as f:
            f.write(strict_text(values) + "\n")

    def sync(self) -> None:
        """Flush the lines to the disk, so that a checkpoint never outlives the lines before it."""
        if self.path.exists():
            with open(self.path, "rb+") as f:
                os.fsync(f.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.exists():
            return []
        lines = (_log_line(line) for line in self.path.read_bytes().split(b"\n")[:-1])
        return [line for line in lines if line is not None]

    def cut(self, phase: str, step: int) -> None:
        """Drop the lines of `phase` from `step` on: they will be written again."""
        if self.path.exists():
            kept = [v for v in self.read() if v["phase"] != phase or v["step"] < step]
            write_text(self.path, "".join(strict_text(v) + "\n" for v in kept), self.mode)


def _log_line(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(values, dict) and isinstance(values.get("phase"), str) and type(values.get("step")) is int:
        return {k: v if k == "phase" else number(v) for k, v in values.items()}
    return None
