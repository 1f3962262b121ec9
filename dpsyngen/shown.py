"""Text of unknown origin made fit for a message: short, on one line, and without anything that a terminal obeys.

File names, class names and settings may come from strangers.  Echoed as they are, they could move a terminal's cursor,
reverse the reading order, or fill the screen with a million characters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

MOST_NAMES = 20  # names inside a sentence
_LONGEST = 400  # characters of one text inside a message: longer than most paths


def printable(text: object, longest: int = _LONGEST) -> str:
    """``text`` on one line, shortened in the middle, with what no terminal should get (controls, marks of direction,
    broken Unicode) written as escapes."""
    whole = str(text)
    if len(whole) > longest:
        head = longest * 2 // 3
        whole = f"{whole[:head]}…{whole[len(whole) - (longest - head) :]} ({len(whole):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in whole)


def listed(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """Names in quotes, the first 20 of them, for a message."""
    texts = [f"{printable(name, 80)!r}" for name in names]
    return (", ".join(texts[:most]) + (f", … ({len(texts):,} in all)" if len(texts) > most else "")) or "none"


class _Short(reprlib.Repr):
    """``repr`` that stays short for nested, recursive or shared values, whose full text may be exponentially long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 5

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) < 10**40:
            return repr(x)
        # Python refuses to write out integers of some thousand digits, and a reader has no use for them.
        return f"a whole number of {x.bit_length():,} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except Exception:  # whatever the object's own repr raises
            return f"<{type(x).__name__}>"


_short = _Short()


def shown(value: object) -> str:
    """``repr(value)`` for a message: at most some hundred printable characters, whatever ``value`` is."""
    return printable(_short.repr(value), 200)
