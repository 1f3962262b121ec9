"""Errors that a user can act on.

Every message says what was given, what is allowed and what to do.  The command line prints the message alone
(no traceback) and exits with ``exit_code``; from Python they are ordinary exceptions.
"""

from __future__ import annotations


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
