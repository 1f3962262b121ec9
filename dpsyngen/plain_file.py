"""Opening a file that a stranger may have put there: no link, no pipe, no device, and not larger than it may be."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


class NotPlainError(Exception):
    """The file is not what was wanted; the message says why, and the caller adds which one."""


def open_plain(path: str | os.PathLike[str], max_bytes: int) -> BinaryIO:
    """The regular file `path`, opened for reading.

    What is checked is what was opened, so nothing can take its place in between.  Links in the folders above are
    followed.

    Raises:
        NotPlainError: it is missing, a link, not a regular file, or larger than ``max_bytes``.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        linked = error.errno == errno.ELOOP
        why = "a symbolic link, which is not followed" if linked else error.strerror
        raise NotPlainError(f"cannot be opened ({why})") from None
    except ValueError:
        raise NotPlainError("cannot be opened (its name cannot be a path)") from None
    status = os.fstat(descriptor)
    why = ""
    if not stat.S_ISREG(status.st_mode):
        why = "not a plain file"
    elif status.st_size > max_bytes:
        why = f"{status.st_size:,} bytes: over the limit of {max_bytes:,}"
    if why:
        os.close(descriptor)
        raise NotPlainError(why)
    return os.fdopen(descriptor, "rb")
