"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsyngen.errors import RunError

# Locks that this process holds, by device and inode.
_held: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()


class Lock:
    """An exclusive lock on a file (``flock``); the system frees it when the process ends, however it ends.

    :meth:`acquire` holds it until :meth:`release` or the end of the object; :meth:`held` is a context.  Within a
    process a lock that is merely acquired passes on to the next object that asks for it: a training that was given up
    does not stand in the way of the one that resumes it.  Within a context it stays where it is.

    Args:
        path: the lock file; made if it is missing, never removed.
        whose: what to call the folder in messages.
    """

    def __init__(self, path: Path, whose: Path) -> None:
        self.path, self.whose = path, whose
        self._fd: int | None = None
        self._contexts = 0

    def __del__(self) -> None:
        self.release()

    def acquire(self) -> bool:
        """Take the lock; whether it had to be taken, so was not held by this object already.

        Raises:
            RunError: somebody else holds it, the folder cannot be written, or its file system has no locks.
        """
        if self._fd is not None:
            return False
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "Free some space, then try again" if full else "Make it writable, or work on a copy that is"
            raise RunError(f"{self.whose} cannot be written: {_reason(error)}.  {advice}.") from None
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        return True

    def _take(self, fd: int) -> None:
        identity = _identity(os.fstat(fd))
        other = _held.get(identity)
        if other is not None and other._fd is not None and not other._contexts:
            os.close(fd)
            fd, other._fd = other._fd, None
        else:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is working on {self.whose}.  Wait for it or stop it first.") from None
            except OSError as error:
                raise RunError(
                    f"{self.whose} is on a file system without locks ({_reason(error)}), so nothing would stop two "
                    "processes from working on one run.  Use a local disk, or a network disk that has locks."
                ) from None
            try:
                current = _identity(os.stat(self.path))
            except OSError:
                current = None
            if current != identity:
                raise RunError(f"another process is changing {self.whose}.  Try again when it is done.")
        self._fd = fd
        _held[identity] = self

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the lock; contexts of one object nest.  Yields what :meth:`acquire` returns."""
        fresh = self.acquire()
        self._contexts += 1
        try:
            yield fresh
        finally:
            self._contexts -= 1
            if not self._contexts:
                self.release()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _reason(error: OSError) -> str:
    return error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")


def _forget_in_child() -> None:
    # A forked child would keep the lock of a parent that was killed.  Closing its copy leaves the parent's as it is.
    for lock in list(_held.values()):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
