"""Writing files so that a crash leaves the old content or the new, never a piece."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None], mode: int = 0o644) -> None:
    """Call ``write(temporary path)``, flush it to the disk and rename it to `path`.

    Args:
        path: where the content ends up; its folder must exist.
        write: writes the content to the path it is given.
        mode: permissions of the file.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, mode)


def require_absent_or_empty(path: Path, option: str) -> None:
    """Raise RunError if the folder `path` has anything in it, so that nothing is ever overwritten."""
    from dpsyngen.errors import RunError

    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise RunError(
            f"{option} {path} exists already and is not an empty folder.  Choose another path or move it away."
        )
