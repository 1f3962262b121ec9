"""Silence for Pillow and the libraries below it: what they say of a broken file names no file.

Whatever of it matters is raised as an error and reported with the file's name.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ignored = logging.NullHandler()


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """No warnings, no log lines on the terminal, and no messages of libtiff while the context lasts.

    An application that collects the log of Pillow still gets it.
    """
    logger = logging.getLogger("PIL")
    logger.addHandler(_ignored)  # without any handler, Python prints errors to the terminal
    handler = _set_tiff_handler(None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_tiff_handler(handler)
        logger.removeHandler(_ignored)


def _set_tiff_handler(handler: int | None) -> int | None:
    """Have libtiff call this function (an address; None: nothing) for errors; the one before it.

    libtiff prints to the terminal by itself, and Pillow has no switch for that.
    """
    try:
        from PIL import _imaging

        # A symbol is looked up in the libraries that a module was linked with, too.
        change = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (ImportError, OSError, AttributeError):
        return None  # a Pillow without libtiff, or with its names hidden: it may print
    change.restype, change.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before: int | None = change(handler)
    return before
