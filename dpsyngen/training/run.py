"""The run directory: a private half that never leaves the room and a release half that is safe to publish.

::

    run.json      format version
    private/      mode 0700: lock, key, ledger, checkpoints, losses, private metrics, the full report
    release/      weights, generator.json, configuration, privacy statement, samples, the public report
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from filelock import FileLock, Timeout

from dpsyngen.config import Config, validate
from dpsyngen.distributed import started_by_torchrun
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import (
    OF_THE_DISK,
    expanded,
    is_temporary,
    read_yaml_file,
    remove_temporaries,
    require_absent_or_empty,
    sync_folder,
    write_text,
)
from dpsyngen.privacy.ledger import Head, Ledger
from dpsyngen.version import FORMAT, __version__

LOCK = "lock"


class Run:
    """One run directory, at an existing `path`; RunError if it is none, or written in another format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private, self.release = path / "private", path / "release"
        self.ledger_path, self.data_path = self.private / "ledger.jsonl", self.private / "data.json"
        self.randomness_path, self.engine_path = self.private / "randomness.json", self.private / "engine.json"
        self.features_path = self.private / "features"  # of real images, kept by evaluations
        self._lock = FolderLock(self.private / LOCK, path)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            if path.is_file() and path.suffix.lower() == ".zip":
                what = "is a bundle, which has no private half (sample, export and verify take bundles)"
            raise RunError(f"{path} {what}.  Give the folder that `dpsyngen train --out` made.")
        try:
            stamp = json.loads((path / "run.json").read_text(encoding="utf-8"))
            found = stamp["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{path} is not a run directory (no readable run.json).  Give the folder that "
                "`dpsyngen train --out` made"
                + (", not its release alone." if (path / "generator.json").is_file() else ".")
            ) from None
        if found != FORMAT:
            raise RunError(
                f"{path} was written in run format {found} (dpsyngen {stamp.get('dpsyngen', '?')}), but this is "
                f"dpsyngen {__version__}, which reads format {FORMAT}.  Use the version that made it."
            )

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Make a run directory at `path`, which is absent or an empty folder (else RunError), and hold its lock.

        It is made where it is, so `path` may be a mounted disk, and ``run.json`` comes last: without that there is no
        run, but what a killed start left, which the next one completes.  Of two that start at once one gets the lock.
        """
        require_new(path)
        private, weights = path / "private", path / "release" / "weights"
        try:
            path.mkdir(parents=True, exist_ok=True)
            try:
                private.mkdir(mode=0o700)
            except FileExistsError:
                require_new(path)
            with FolderLock(private / LOCK, path).held():
                require_new(path)  # another process may have made it meanwhile
                weights.mkdir(parents=True, exist_ok=True)
                sync_folder(weights.parent)
                write_text(private / "config.yaml", config.to_yaml(), 0o600)
                write_text(path / "run.json", json.dumps({"format": FORMAT, "dpsyngen": __version__}) + "\n")
            with contextlib.suppress(OSError):  # the parent need not be readable for us
                sync_folder(path.absolute().parent)
        except OSError as error:
            raise RunError(
                f"the run directory {path} cannot be made: {error.strerror}.  Nothing was trained yet.  Mend that or "
                "choose another path, and start again."
            ) from None
        run = cls(path)
        run.open_for_writing()
        return run

    @property
    def complete(self) -> bool:
        """Whether training has finished and the generator is released."""
        return (self.release / "generator.json").exists()

    @property
    def busy(self) -> bool:
        """Whether a process works on the run; looking makes no file, and its lock is gone at once."""
        try:
            with open(self.private / LOCK, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    @property
    def config(self) -> Config:
        """The full configuration of the run."""
        try:
            return validate(read_yaml_file(self.private / "config.yaml", "the configuration"))
        except ConfigError as error:
            raise RunError(f"the configuration of {self.path} cannot be used: {error}") from None

    def weights(self, network: str) -> Path:
        """Where the released weights of `network` are."""
        return self.release / "weights" / f"{network}.safetensors"

    def require_complete(self) -> None:
        """Raise RunError unless training has finished."""
        if not self.complete:
            raise RunError(
                f"{self.path} is not finished: its training was interrupted.  Continue it with "
                f"`dpsyngen train --resume --out {quote(str(self.path))}`."
            )

    def finished_ledger(self) -> Ledger:
        """The ledger of a finished run; RunError if it lacks charges that it had at the release."""
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
        """Take the lock until the next :meth:`lock` context or this object ends; remove what killed processes left.

        RunError if another process works on the run, or it cannot be written.
        """
        if self._lock.acquire():
            released = (self.release, self.release / "weights", self.release / "denoiser")
            for folder in (self.path, self.private, self.features_path, *released):
                if folder.is_dir():
                    remove_temporaries(folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory alone, as :meth:`open_for_writing` does; contexts of one object nest."""
        self.open_for_writing()
        with self._lock.held():
            yield


class FolderLock:
    """An exclusive lock on the folder `whose` (``flock``); the system frees it when the process ends, however it ends.

    :meth:`acquire` holds it until the outermost :meth:`held` context ends, or until the object does.  The lock file
    `path` is made if it is missing, and never removed.
    """

    def __init__(self, path: Path, whose: Path) -> None:
        self.path, self.whose = path, whose
        # Not at once: somebody may be looking (:attr:`Run.busy`).
        self._lock = FileLock(path, timeout=0.2, mode=0o600, thread_local=False)
        self._contexts = 0

    def acquire(self) -> bool:
        """Take the lock; False if this object held it already.

        RunError if another process holds it, the folder cannot be written, or its file system has no locks.
        """
        if self._lock.is_locked:
            return False
        try:
            self._lock.acquire(poll_interval=0.02)
        except Timeout:
            raise RunError(f"another process is working on {self.whose}.  Wait for it or stop it first.") from None
        except OSError as error:
            advice = "Make it writable, or work on a copy that is"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = "Free some space, then try again"
            elif error.errno in (errno.ENOLCK, errno.ENOTSUP):
                advice = "That file system has no locks: use a local disk, or a network disk that has some"
            raise RunError(f"{self.whose} cannot be written: {error.strerror}.  {advice}.") from None
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, in contexts that nest."""
        self.acquire()
        self._contexts += 1
        try:
            yield
        finally:
            self._contexts -= 1
            if not self._contexts:
                self._lock.release(force=True)


@contextlib.contextmanager
def place_of(out: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """Where to make a run: `out`, or a new folder `name` in ``runs``, which goes again if nothing is made in it.

    ConfigError if torchrun started this process and `out` is missing: each process would choose another.
    """
    if out is not None:
        yield expanded(out)
        return
    if started_by_torchrun():
        raise ConfigError("out is missing: the processes of torchrun have to be given one run directory.")
    first = path = Path("runs") / name
    for number in itertools.count(2):
        try:
            path.mkdir(parents=True)  # of two that begin in one second, each has its own
            break
        except FileExistsError:
            path = first.with_name(f"{first.name}-{number}")
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


def require_new(path: Path) -> None:
    """Raise RunError unless a run can be made at `path`: absent, empty, or no more than a killed start left there."""
    if (path / "run.json").exists():
        if (path / "release" / "generator.json").exists():
            raise RunError(f"--out {path} exists already and holds a finished run.  Choose another path.")
        raise RunError(
            f"--out {path} exists already and holds an unfinished run.  Continue it with "
            f"`dpsyngen train --resume --out {quote(str(path))}`, or choose another path."
        )
    if not _only_begun(path):
        require_absent_or_empty(path, "--out")


# All that a start makes before ``run.json``: no key yet, so there is nothing that could be lost or was spent.
_BEGUN = {".": {"private", "release"}, "private": {LOCK, "config.yaml"}, "release": {"weights"}, "release/weights": ()}


def _only_begun(path: Path) -> bool:
    """Whether at `path` is what a killed :meth:`Run.create` of this user left, and nothing else."""
    private = path / "private"
    if not private.is_dir() or private.stat().st_uid != os.geteuid() or private.stat().st_mode & 0o077:
        return False
    found = [entry for name in _BEGUN if (path / name).is_dir() for entry in (path / name).iterdir()]
    known = {path / folder / name for folder, names in _BEGUN.items() for name in (*names, *OF_THE_DISK)}
    return all((f in known or is_temporary(f.name)) and not f.is_symlink() for f in found)
