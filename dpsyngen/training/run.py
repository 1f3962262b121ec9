"""The run directory: a private half that never leaves the room and a release half that is safe to publish.

::

    run.json      format version
    private/      mode 0700: ledger, random state, checkpoints, losses, private metrics, the full report
    release/      weights, generator.json, configuration, privacy statement, samples, the public report
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dpsyngen.config import Config, validate
from dpsyngen.errors import RunError
from dpsyngen.files import require_absent_or_empty, write_text
from dpsyngen.version import FORMAT, __version__


class Run:
    """One run directory.

    Args:
        path: an existing run directory (see :meth:`create`).

    Raises:
        RunError: not a run directory, or written in another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private, self.release = path / "private", path / "release"
        if not path.is_dir():
            raise RunError(f"{path} is not a folder.  Give the folder that `dpsyngen train --out` made.")
        try:
            stamp = json.loads((path / "run.json").read_text())
            found = stamp["format"]
        except (OSError, ValueError, KeyError, TypeError):
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
        """Make a run directory at `path`, which must not exist or be empty."""
        require_absent_or_empty(path, "--out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "private").mkdir(mode=0o700)
            os.chmod(path / "private", 0o700)
            (path / "release" / "weights").mkdir(parents=True)
        except OSError as error:
            raise RunError(f"the run directory {path} cannot be made: {error.strerror}.") from None
        write_text(path / "private" / "config.yaml", config.to_yaml(), 0o600)
        # Last: a folder without it is no run yet.
        write_text(path / "run.json", json.dumps({"format": FORMAT, "dpsyngen": __version__}) + "\n")
        return cls(path)

    @property
    def complete(self) -> bool:
        """Whether training has finished and the generator is released."""
        return (self.release / "generator.json").exists()

    @property
    def config(self) -> Config:
        """The full configuration of the run."""
        try:
            return validate(yaml.safe_load((self.private / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise RunError(f"the configuration of {self.path} cannot be read: {error}.") from None

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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory alone; RunError if another process works on it."""
        handle = os.open(self.private / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"another process is working on {self.path}.  Wait for it or stop it first.") from None
            yield
        finally:
            os.close(handle)


class JsonLines:
    """A log of one JSON object a line that can be cut back to a step when a run resumes.

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
            f.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def cut(self, phase: str, step: int) -> None:
        """Drop the lines of `phase` from `step` on: they will be written again."""
        if self.path.exists():
            kept = [v for v in self.read() if v["phase"] != phase or v["step"] < step]
            write_text(self.path, "".join(json.dumps(v) + "\n" for v in kept), self.mode)
