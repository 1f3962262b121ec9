"""How many pixels may be decoded at a time, over all threads, and over processes that share a lock file.

A file of some kilobytes can decode to hundreds of megabytes.  One such file is bounded by the limit on pixels; this
bounds what several of them take together.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LARGE = 2**22


class PixelBudget:
    """Lets threads in while the pixels that they decode stay within a total.

    Args:
        total: pixels.
        turns: a lock file; of the processes that have the same one, one at a time decodes a large image.
    """

    def __init__(self, total: int, turns: str | None = None) -> None:
        self.total, self.turns = total, turns
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def spend(self, pixels: int) -> Iterator[None]:
        """Hold ``pixels`` of the total, waiting until they are free.  More than the total counts as all of it."""
        pixels = min(pixels, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            with _turn(self.turns if pixels > _LARGE else None):
                yield
        finally:
            if pixels > _LARGE:
                _return_memory()
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


@contextmanager
def _turn(path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing gives it back
        yield


def _return_memory() -> None:
    """Give freed memory back to the system.

    The C library keeps what a thread freed for that thread, so eight threads would hold eight large images' worth.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return  # another C library than GNU's, with another policy
    trim(0)
