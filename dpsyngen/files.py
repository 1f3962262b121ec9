"""Writing files so that a crash leaves the old content or the new, never a piece."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

# What a killed process leaves behind must be told from anything that a user could have put there.
TEMPORARY_SUFFIX = ".dpsyngen-tmp"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMPORARY_SUFFIX))


def write_atomically(path: Path, write: Callable[[Path], None], mode: int = 0o644) -> None:
    """Call ``write(temporary path)``, flush it to the disk and rename it to `path`.

    A process that is killed meanwhile leaves a hidden temporary file beside `path`; see :func:`remove_temporaries`.

    Args:
        path: where the content ends up; its folder must exist.
        write: writes the content to the path it is given.
        mode: permissions of the file.

    Raises:
        OSError: the disk is full, read-only, …; it names `path`, which is as it was before.
    """
    temporary: Path | None = None
    try:
        # A file name has 255 bytes at most, four a character.
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=TEMPORARY_SUFFIX)
        os.close(fd)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, mode)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk: what was renamed stays renamed after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_temporary(name: str) -> bool:
    """Whether `name` is one that this module gives to unfinished files."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in `folder`, and nothing else; not in its sub-folders.

    Call it only where no other process can be writing.
    """
    with os.scandir(folder) as entries:
        left = [e.path for e in entries if is_temporary(e.name) and e.is_file(follow_symlinks=False)]
    for name in left:
        Path(name).unlink(missing_ok=True)


def require_absent_or_empty(path: Path, option: str) -> None:
    """Raise RunError if the folder `path` has anything in it, so that nothing is ever overwritten."""
    from dpsyngen.errors import RunError

    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise RunError(
            f"{option} {path} exists already and is not an empty folder.  Choose another path or move it away."
        )
