"""The ledger: every access to the private images, written down before its result is used.

One JSON object a line, append-only, hash-chained (:mod:`dpsyngen.privacy.chain`), flushed to the disk before
:meth:`Ledger.charge` returns.  ε is always computed from the file; there is no counter to forget or to pass by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dpsyngen.errors import BudgetExceeded, LedgerError
from dpsyngen.privacy.accounting import Accountant, Mechanism, check_group_size, epsilon, merge
from dpsyngen.privacy.chain import HashChain, Head

FORMAT = 2
Kind = Literal["dp", "private", "non-private", "public"]


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

    kind: Kind
    reason: str
    mechanism: Mechanism | None
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "mechanism": self.mechanism and self.mechanism.to_dict(),
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> LedgerEntry:
        """The inverse.  Raises ValueError, KeyError or TypeError if something does not fit."""
        mechanism = body["mechanism"]
        entry = cls(
            body["kind"],
            str(body["reason"]),
            None if mechanism is None else Mechanism(**mechanism),
            dict(body["details"]),
        )
        if entry.kind not in get_args(Kind):
            raise ValueError(f"kind {entry.kind!r}")
        if (entry.kind == "dp") != (entry.mechanism is not None):
            raise ValueError(f"an entry of kind {entry.kind!r} {'without' if entry.kind == 'dp' else 'with'} mechanism")
        return entry


def check_affordable(mechanisms: Iterable[Mechanism], target: float, delta: float, group_size: int, whose: str) -> None:
    """Raise BudgetExceeded if all `mechanisms` together cost more than `target` at `delta`."""
    total = epsilon(mechanisms, delta, group_size=group_size)
    if not total <= target:  # also where either is not a number
        group = f" for {group_size} images together" if group_size > 1 else ""
        raise BudgetExceeded(
            f"refused: the total would come to ε = {total:.4f} at δ = {delta:.3g}{group}, above the {whose} "
            f"ε = {target:.4g}.  Take fewer steps, add noise, or raise the target if your policy allows it."
        )


class Ledger:
    """The accesses to one data set by one run, and the budget that they may not exceed.

    Args:
        path: an existing ledger file (see :meth:`create`).

    Attributes:
        entries: the accesses, in order.
        target_epsilon: ε that the total may not exceed; ``math.inf`` for a non-private reference.
        delta: δ at which ε is stated.
        records: declared number of records n.
        group_size: g; ε is for up to g records together.
        run: a name of the run that nobody can choose, derived from its secret key.
        secure: False if the noise came from a reproducible seed, so that ε is not a guarantee.

    Raises:
        LedgerError: the file was edited, truncated or reordered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chain = HashChain(path, "ledger")
        self._affordable: list[dict[tuple[float, float], int]] = []
        header, *records = self._chain.records
        self._header(header)
        self.entries: list[LedgerEntry] = []
        for number, body in enumerate(records, 2):
            try:
                self.entries.append(LedgerEntry.from_dict(body))
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerError(f"line {number} of the ledger {path} is damaged: {error}.") from None

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        target_epsilon: float,
        delta: float,
        records: int,
        group_size: int = 1,
        run: str = "",
        secure: bool = True,
        earlier: tuple[Mechanism, ...] = (),
    ) -> Ledger:
        """Start a ledger with its budget.

        Args:
            path: a file that does not exist yet.
            target_epsilon, delta, records, group_size, run, secure: see the attributes.
            earlier: mechanisms already run on the same data elsewhere; they count towards the total.
        """
        check_group_size(group_size)
        header = {
            "format": FORMAT,
            "target_epsilon": "inf" if math.isinf(target_epsilon) else target_epsilon,
            "delta": delta,
            "records": records,
            "unit": "one image" if group_size == 1 else f"up to {group_size} images together",
            "group_size": group_size,
            "adjacency": "add or remove records; sampling rate and normaliser are public constants",
            "run": run,
            "randomness": "operating system" if secure else "reproducible seed",
        }
        HashChain.create(path, "ledger", header)
        ledger = cls(path)
        for mechanism in earlier:
            ledger.charge(mechanism, "earlier access to the same data, declared by the user")
        return ledger

    def _header(self, body: dict[str, Any]) -> None:
        if body.get("format") != FORMAT:
            raise LedgerError(
                f"the ledger {self.path} is of format {body.get('format')!r}, but this version reads format {FORMAT}.  "
                "Use the version of dpsyngen that made it."
            )
        try:
            self.target_epsilon = float(body["target_epsilon"])
            self.delta = float(body["delta"])
            self.records = int(body["records"])
            self.group_size = body["group_size"]
            check_group_size(self.group_size)
            self.run = str(body["run"])
            self.secure = body["randomness"] == "operating system"
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"the first line of the ledger {self.path} is damaged: {error}.") from None

    # ------------------------------------------------------------------------------------------ reading

    @property
    def head(self) -> Head:
        """Length and last digest: what to keep elsewhere as proof that the ledger was not changed since."""
        return self._chain.head

    def has_been(self, head: Head) -> bool:
        """Whether everything up to `head`, kept elsewhere, is still as it was then."""
        return self._chain.has_been(head)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All mechanisms charged so far."""
        return tuple(e.mechanism for e in self.entries if e.mechanism is not None)

    @property
    def non_private(self) -> bool:
        """Whether private images were used without noise, so that ε is infinite."""
        return any(e.kind == "non-private" for e in self.entries)

    def epsilon(
        self, delta: float | None = None, accountant: Accountant = "pld", group_size: int | None = None
    ) -> float:
        """Total ε of everything in the ledger, at the ledger's δ and group size or others.

        Infinite after a non-private access.
        """
        if self.non_private:
            return math.inf
        g = self.group_size if group_size is None else group_size
        return epsilon(self.mechanisms, self.delta if delta is None else delta, accountant, g)

    # ------------------------------------------------------------------------------------------ writing

    def catch_up(self) -> None:
        """After a crash: make sure that the last line is known to the head; only for the process that may write."""
        self._chain.catch_up()

    def charge(self, mechanism: Mechanism, reason: str, **details: Any) -> None:
        """Write down a mechanism that is about to run; returns once the line is on the disk.

        Raises:
            BudgetExceeded: the total would exceed the target.  Nothing was written and nothing may be run.
        """
        self.require(mechanism)
        kind: Kind = "dp" if mechanism.noise_multiplier > 0 else "non-private"
        self._append(LedgerEntry(kind, reason, mechanism if kind == "dp" else None, details))

    def require(self, *mechanisms: Mechanism) -> None:
        """Raise :class:`BudgetExceeded` if `mechanisms` on top of what is charged would exceed the target.

        Asking for all of a run at once makes what is charged later, in parts, free of computation.
        """
        if math.isinf(self.target_epsilon):
            return
        total = merge((*self.mechanisms, *mechanisms))
        counts = {(m.sampling_rate, m.noise_multiplier): m.count for m in total}
        if any(all(counts[k] <= known.get(k, 0) for k in counts) for known in self._affordable):
            return
        check_affordable(total, self.target_epsilon, self.delta, self.group_size, "target")
        self._affordable.append(counts)

    def note_private_access(self, reason: str, **details: Any) -> None:
        """Write down a look at private images whose result stays in the private half."""
        self._append(LedgerEntry("private", reason, None, details))

    def note_public_choice(self, reason: str, **details: Any) -> None:
        """Write down a choice that was made without looking at private images."""
        self._append(LedgerEntry("public", reason, None, details))

    def _append(self, entry: LedgerEntry) -> None:
        self._chain.append(entry.to_dict())
        self.entries.append(entry)
