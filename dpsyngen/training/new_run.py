"""Making a run directory so that a crash leaves a run, or something that the next start can clear away.

Everything is made in a hidden stage inside the folder and moved out of it, ``run.json`` last:

=========================================  ==========================================
the folder has                             it is
=========================================  ==========================================
nothing                                    not begun
``.new-run.*``                             an interrupted start
``.new-run.*``, ``private``, ``release``   an interrupted start (``run.json`` is still in the stage)
``run.json``, ``private``, ``release``     a run
=========================================  ==========================================

The stage is inside and not beside the folder, since the folder may be all that the user can write to (a mounted
volume).  Moving ``private`` fails where there is one already, so of two processes that start at once one loses.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from dpsyngen.errors import RunError
from dpsyngen.files import TEMPORARY_SUFFIX, remove_temporaries, require_absent_or_empty, sync_folder, write_text
from dpsyngen.training.lock import Lock

_STAGE = ".new-run."
_MOVED = ("private", "release", "run.json")
LOCK = "lock"


def require_new(path: Path) -> None:
    """Raise RunError unless a run can be made at `path`: it is absent, empty, or holds an interrupted start alone."""
    if (path / "run.json").exists():
        if (path / "release" / "generator.json").exists():
            raise RunError(f"--out {path} exists already and holds a finished run.  Choose another path.")
        raise RunError(
            f"--out {path} exists already and holds an unfinished run.  Continue it with "
            f"`dpsyngen train --resume --out {path}`, or choose another path."
        )
    if not interrupted_start(path):
        require_absent_or_empty(path, "--out")


def interrupted_start(path: Path) -> bool:
    """Whether `path` has what a killed :func:`make_folders` leaves, and nothing else."""
    stages = _stages(path)
    if not stages:
        return False
    others = {p.name for p in path.iterdir()} - {p.name for p in stages}
    # Only what came out of a stage, which still has its run.json.
    return not others or (others <= {"private", "release"} and any((s / "run.json").exists() for s in stages))


def make_folders(path: Path, stamp: str, config: str) -> Lock:
    """Make a run directory at `path` (see :func:`require_new`) and hold its lock.

    Args:
        path: where; its parents are made.
        stamp: content of ``run.json``.
        config: content of ``private/config.yaml``.

    Raises:
        RunError: it cannot be made; nothing is left of it.
    """
    fresh = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _clear(path)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, suffix=TEMPORARY_SUFFIX, dir=path))
        try:
            return _fill(path, stage, stamp, config)
        except BaseException:
            with contextlib.suppress(OSError, RunError):
                if not (path / "private").exists() or (stage / "private").exists():
                    _remove(stage)
                elif not (path / "run.json").exists():
                    _clear(path)
            raise
    except BaseException as error:
        if fresh:
            with contextlib.suppress(OSError):
                path.rmdir()
        if not isinstance(error, OSError):
            raise
        raise RunError(
            f"the run directory {path} cannot be made: {error.strerror}.  Nothing was trained yet; mend that or "
            "choose another path, and start again."
        ) from None


def _fill(path: Path, stage: Path, stamp: str, config: str) -> Lock:
    (stage / "private").mkdir(mode=0o700)
    os.chmod(stage / "private", 0o700)
    lock = Lock(stage / "private" / LOCK, path)
    lock.acquire()
    write_text(stage / "private" / "config.yaml", config, 0o600)
    (stage / "release" / "weights").mkdir(parents=True)
    write_text(stage / "run.json", stamp)
    for name in _MOVED:
        (stage / name).rename(path / name)
    stage.rmdir()
    sync_folder(path)
    with contextlib.suppress(OSError):  # it need not be ours to read
        sync_folder(path.parent)
    lock.path = path / "private" / LOCK
    return lock


def clear_stages(path: Path) -> None:
    """Remove the empty stages that a start left which was killed when all was moved."""
    for stage in _stages(path):
        with contextlib.suppress(OSError):
            stage.rmdir()


def _stages(path: Path) -> list[Path]:
    return sorted(p for p in path.glob(f"{_STAGE}*{TEMPORARY_SUFFIX}") if p.is_dir() and not p.is_symlink())


def _clear(path: Path) -> None:
    """Remove an interrupted start.

    Raises:
        RunError: the process that makes it is alive.
        OSError: there is something else in it.
    """
    stages = _stages(path)
    if not stages:
        return
    if not interrupted_start(path):
        require_absent_or_empty(path, "--out")
    with contextlib.ExitStack() as locks:
        # Halves move from the stage to the folder, so who looks in that order misses none of a process that is alive.
        held = {folder for folder in (*stages, path) if _hold(folder, path, locks)}
        if (path / "run.json").exists():
            raise RunError(f"another process has just made {path}.  Choose another path, or try again.")
        if path in held:
            _remove_halves(path)
        # What tells an interrupted start goes last.
        for stage in stages:
            if stage in held or path in held:  # in the latter case its private half is the one that was moved
                _remove(stage)
            else:
                _remove_empty(stage, path)


def _hold(folder: Path, path: Path, locks: contextlib.ExitStack) -> bool:
    """Lock the private half in `folder`, if there is one; raise RunError if the process that makes it is alive."""
    if not (folder / "private").is_dir():
        return False
    lock = Lock(folder / "private" / LOCK, path)
    lock.acquire()
    locks.callback(lock.release)
    return True


def _remove_empty(stage: Path, path: Path) -> None:
    """Remove a stage of which no private half was found."""
    try:
        stage.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        # A process that is alive has its private half in one of two places from the first file on.
        if any((folder / "private").is_dir() for folder in (stage, path)):
            raise RunError(f"another process is making {path}.  Choose another path, or try again.") from None
        _remove(stage)  # clearing it was cut off


def _remove(stage: Path) -> None:
    _remove_halves(stage)
    remove_temporaries(stage)
    (stage / "run.json").unlink(missing_ok=True)
    stage.rmdir()


def _remove_halves(folder: Path) -> None:
    """Remove the two halves as they are at the start, each file by its name, so that nothing of the user's can go."""
    for name in ("release/weights", "release"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rmdir()
    private = folder / "private"
    if private.is_dir():
        remove_temporaries(private)
        for name in ("config.yaml", LOCK):
            (private / name).unlink(missing_ok=True)
        private.rmdir()
