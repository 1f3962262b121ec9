"""How this package compiles its inner loops.

Images must be the same on every machine, so compiled code here uses only what IEEE 754 fixes to the last
bit: integers, + − × ÷ √, comparisons and rounding.  No fast-math, and no sin, cos, log or pow, whose last
bits differ between mathematical libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on its first call, releasing the interpreter lock so that threads help.

    The machine code is cached beside the source or, if that is read-only, in numba's user cache
    (``NUMBA_CACHE_DIR``); with no writable place it is compiled anew in each process.  The cache watches
    only the function's own file: after editing a helper that *another* file calls, delete
    ``__pycache__/*.nb*``.
    """
    try:
        return njit(function, cache=True, nogil=True, fastmath=False, error_model="numpy")
    except RuntimeError:  # "cannot cache function: no locator available"
        return njit(function, nogil=True, fastmath=False, error_model="numpy")
