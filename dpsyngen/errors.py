"""Errors that a user can act on: what was given, what is allowed, what to do.

The command line prints the message alone (no traceback) and exits with ``exit_code``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


class DpsyngenError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = 2
    kind = "error"
    """What ``--json`` calls it."""


class ConfigError(DpsyngenError, ValueError):
    """An option has a value that is not allowed, or two options contradict each other."""

    kind = "config"


class DataError(DpsyngenError, ValueError):
    """Images or labels could not be read as asked."""

    kind = "data"


class RunError(DpsyngenError, RuntimeError):
    """A run directory is in the wrong state (exists already, unfinished, other version, other data)."""

    kind = "run"


class BudgetExceeded(DpsyngenError, RuntimeError):
    """An access to private data was refused because it would exceed the run's (ε, δ)."""

    exit_code = 3
    kind = "budget"


class LedgerError(DpsyngenError, RuntimeError):
    """The ledger file was edited, truncated or reordered, so ε cannot be computed from it."""

    exit_code = 3
    kind = "ledger"


class ReleaseError(DpsyngenError, ValueError):
    """A release, a bundle or a certificate is not what it says it is."""

    exit_code = 6
    kind = "release"


class BadImage(Exception):
    """One image cannot be used; the message says why, and the reader, which tells the user, adds where."""


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


_SHORT = reprlib.Repr()  # nested, recursive and shared values, too, whose full text may be exponentially long
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: object) -> str:
    """``repr(value)`` for a message: at most some hundred printable characters, whatever `value` is."""
    try:
        return printable(_SHORT.repr(str(value) if isinstance(value, Path) else value), 200)
    except ValueError:  # Python refuses to write out integers of some thousand digits
        return f"<{type(value).__name__}>"


def require(ok: object, name: str, given: object, allowed: str | Iterable[str]) -> None:
    """Raise ConfigError unless `ok`: the one way in which the package states the bounds of an argument.

    >>> require(False, "steps", 0, "at least 1")
    Traceback (most recent call last):
    ...
    dpsyngen.errors.ConfigError: steps is 0, but must be at least 1.

    Args:
        ok: whether `given` is allowed.
        name: what the user calls it: an option, a setting or an argument.
        given: what was given; shown shortened, whatever it is.
        allowed: what comes after "must be" (a sentence of advice may follow), or the names to choose from.
    """
    if not ok:
        allowed = allowed if isinstance(allowed, str) else "one of " + ", ".join(allowed)
        raise ConfigError(f"{name} is {shown(given)}, but must be {allowed.rstrip('.')}.")


def require_package(package: str, what: str, extra: str) -> None:
    """Raise ConfigError unless `package`, which `what` needs and the extra `extra` brings, is installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install 'dpsyngen[{extra}]'.")
