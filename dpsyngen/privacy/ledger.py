"""The ledger: every access to the private images, written down before its result is used.

One JSON object a line, append-only, each carrying the SHA-256 of the line before it, flushed to the disk before
:meth:`Ledger.charge` returns.  ε is always computed from the file; there is no counter to forget or to pass by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpsyngen.errors import BudgetExceeded, LedgerError
from dpsyngen.privacy.accounting import Accountant, Mechanism, epsilon

_GENESIS = "0" * 64


@dataclass(frozen=True)
class LedgerEntry:
    """One access.

    Attributes:
        kind: "dp" for a mechanism whose result may be released; "private" for a look whose result stays in the
            private half (evaluation), which costs nothing but is written down; "non-private" for training without
            noise (ε = ∞); "public" for a choice that looks at no private image and that the guarantee rests on, such
            as which program draws the public images.
        reason: what for, in plain words.
        mechanism: the mechanism, for kind "dp".
        details: sensitivity, first step and whatever else a reader needs to trace it.
    """

    kind: Literal["dp", "private", "non-private", "public"]
    reason: str
    mechanism: Mechanism | None
    details: dict[str, Any]


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


class Ledger:
    """The accesses to one data set by one run, and the budget that they may not exceed.

    Args:
        path: the ledger file; it need not exist yet (see :meth:`create`).

    Raises:
        LedgerError: the file was edited, truncated in the middle or reordered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = _GENESIS
        self.entries: list[LedgerEntry] = []
        self._read()

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        target_epsilon: float,
        delta: float,
        records: int,
        earlier: tuple[Mechanism, ...] = (),
    ) -> Ledger:
        """Start a ledger with its budget.

        Args:
            path: a file that does not exist yet.
            target_epsilon: ε that the total may not exceed; ``math.inf`` for a non-private reference.
            delta: δ at which ε is stated.
            records: declared number of records n, a public constant.
            earlier: mechanisms already run on the same data elsewhere; they count towards the total.
        """
        if path.exists():
            raise LedgerError(f"{path} exists already; a ledger is never started twice.")
        line = cls._line(
            {
                "format": 1,
                "target_epsilon": "inf" if math.isinf(target_epsilon) else target_epsilon,
                "delta": delta,
                "records": records,
                "unit": "one image",
                "adjacency": "add or remove one record; sampling rate and normaliser are public constants",
            },
            _GENESIS,
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        ledger = cls(path)
        for mechanism in earlier:
            ledger.charge(mechanism, "earlier access to the same data, declared by the user")
        return ledger

    @staticmethod
    def _line(body: dict[str, Any], previous: str) -> str:
        return json.dumps({**body, "previous": previous}, sort_keys=True, ensure_ascii=False)

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise LedgerError(f"the ledger {self.path} cannot be read: {error.strerror}.") from None
        lines = data.split(b"\n")
        # A crash while a line was being written leaves a piece without its newline: its access never happened,
        # because charge() returns only after the whole line is on the disk.
        # Bytes, because the piece may end within a character.
        partial = lines.pop()
        self._end, self._size = len(data) - len(partial), len(data)
        if not lines:
            raise LedgerError(f"the ledger {self.path} is empty.")
        previous = _GENESIS
        for number, line in enumerate(lines, 1):
            try:
                body = json.loads(line.decode())
                found = body.pop("previous")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise LedgerError(f"line {number} of the ledger {self.path} is not a ledger entry.") from None
            if found != previous:
                raise LedgerError(
                    f"line {number} of the ledger {self.path} does not follow from the line before it: the file was "
                    "edited, truncated or reordered, so no ε can be stated for this run."
                )
            previous = _digest(line.decode())
            if number == 1:
                self._header(body)
            else:
                try:
                    mechanism = body.get("mechanism")
                    self.entries.append(
                        LedgerEntry(
                            body["kind"],
                            body["reason"],
                            None if mechanism is None else Mechanism(**mechanism),
                            body["details"],
                        )
                    )
                except (ValueError, KeyError, TypeError) as error:
                    raise LedgerError(f"line {number} of the ledger {self.path} is damaged: {error}.") from None
        self._last = previous

    def _header(self, body: dict[str, Any]) -> None:
        try:
            self.target_epsilon = float(body["target_epsilon"])
            self.delta = float(body["delta"])
            self.records = int(body["records"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"the first line of the ledger {self.path} is damaged: {error}.") from None

    # ------------------------------------------------------------------------------------------ reading

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All mechanisms charged so far."""
        return tuple(e.mechanism for e in self.entries if e.mechanism is not None)

    def epsilon(self, delta: float | None = None, accountant: Accountant = "pld") -> float:
        """Total ε of everything in the ledger, at the ledger's δ or another; infinite after a non-private access."""
        if any(e.kind == "non-private" for e in self.entries):
            return math.inf
        return epsilon(self.mechanisms, self.delta if delta is None else delta, accountant)

    # ------------------------------------------------------------------------------------------ writing

    def charge(self, mechanism: Mechanism, reason: str, **details: Any) -> None:
        """Write down a mechanism that is about to run; returns once the line is on the disk.

        Raises:
            BudgetExceeded: the total would exceed the target.  Nothing was written and nothing may be run.
        """
        self.require(mechanism)
        kind: Literal["dp", "non-private"] = "dp" if mechanism.noise_multiplier > 0 else "non-private"
        self._append(LedgerEntry(kind, reason, mechanism if kind == "dp" else None, details))

    def require(self, mechanism: Mechanism) -> None:
        """Raise :class:`BudgetExceeded` if `mechanism` on top of what is charged would exceed the target."""
        if math.isinf(self.target_epsilon):
            return
        total = epsilon((*self.mechanisms, mechanism), self.delta)
        if not total <= self.target_epsilon:  # also where either is not a number
            raise BudgetExceeded(
                f"refused: {mechanism.count} more step(s) at sampling rate {mechanism.sampling_rate:.4g} and noise "
                f"multiplier {mechanism.noise_multiplier:.4g} would bring the total to ε = {total:.4f} at "
                f"δ = {self.delta:.3g}, above the target ε = {self.target_epsilon:.4g}.  Take fewer steps, add noise, "
                "or raise the target if your policy allows it (in a new run)."
            )

    def note_private_access(self, reason: str, **details: Any) -> None:
        """Write down a look at private images whose result stays in the private half."""
        self._append(LedgerEntry("private", reason, None, details))

    def note_public_choice(self, reason: str, **details: Any) -> None:
        """Write down a choice that was made without looking at private images."""
        self._append(LedgerEntry("public", reason, None, details))

    def _append(self, entry: LedgerEntry) -> None:
        body = {
            "kind": entry.kind,
            "reason": entry.reason,
            "mechanism": entry.mechanism and entry.mechanism.to_dict(),
            "details": entry.details,
        }
        line = self._line(body, self._last)
        # Without buffering: what a failed flush (a full disk) left behind is cut off, so that no half line can
        # swallow the next entry.
        with open(self.path, "r+b", buffering=0) as f:
            if f.seek(0, os.SEEK_END) != self._size:
                raise LedgerError(
                    f"the ledger {self.path} has changed since it was read, so another process may be charging the "
                    "same budget; nothing was charged.  Let the other one end, then start again."
                )
            end = self._end
            f.truncate(end)
            self._size = end
            f.seek(end)
            data = (line + "\n").encode()
            try:
                if f.write(data) != len(data):
                    raise OSError(28, "No space left on device")
                os.fsync(f.fileno())
            except OSError:
                f.truncate(end)
                raise
        self._end = self._size = end + len(data)
        self.entries.append(entry)
        self._last = _digest(line)
