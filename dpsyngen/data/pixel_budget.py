"""How many pixels may be decoded at a time, over all threads.

A file of some kilobytes can decode to hundreds of megabytes.  One such file is bounded by the limit on pixels; this
bounds what several of them take together.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LARGE = 2**22


class PixelBudget:
    """Lets threads in while the pixels that they decode stay within a total.

    Args:
        total: pixels.
    """

    def __init__(self, total: int) -> None:
        self.total = total
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
            yield
        finally:
            if pixels > _LARGE:
                _return_memory()
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _return_memory() -> None:
    """Give freed memory back to the system.

    The C library keeps what a thread freed for that thread, so eight threads would hold eight large images' worth.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return  # another C library than GNU's, with another policy
    trim(0)
