"""The ledger: every access to the private images, written down before its result is used.

One JSON object a line, append-only, each with the SHA-256 of the line before it, flushed to the disk before
:meth:`Ledger.charge` returns.  ε is always computed from the file; there is no counter to forget or to pass by hand.

The chain of digests shows that a line was edited, dropped or moved, but not that its end was cut off.  So the number of
lines and the digest of the last one are kept in a second file, the head (``NAME.head``), written after the line:

=========================  ===========================================================================
a crash                    leaves
=========================  ===========================================================================
while a line is written    a piece without its newline, which counts for nothing
before the head is         one whole line more than the head knows, which counts
=========================  ===========================================================================

Anything else that does not fit together is refused.  Who may write into the folder can forge both files; what stands
against that is a copy of the head elsewhere (:attr:`Ledger.head`): a certificate holds one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dpsyngen.errors import BudgetExceeded, LedgerError
from dpsyngen.files import write_text
from dpsyngen.privacy.accounting import Accountant, Mechanism, check_group_size, epsilon, merge
from dpsyngen.privacy.certificate import rounded_up

FORMAT = 2
Kind = Literal["dp", "private", "non-private", "public"]
_GENESIS = "0" * 64


@dataclass(frozen=True)
class Head:
    """How long a chain is, the first line included, and how it ends: the SHA-256 of its last line."""

    lines: int
    digest: str


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _line(body: dict[str, Any], previous: str) -> bytes:
    return json.dumps({**body, "previous": previous}, sort_keys=True, ensure_ascii=False).encode()


class HashChain:
    """An append-only file of JSON objects (``bodies``), each chained to the one before by its digest.

    `what` is what messages call the file.  LedgerError if it was edited, truncated or reordered, or its head is missing
    or does not fit.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.bodies: list[dict[str, Any]] = []
        self._digests: list[str] = []
        self._known: Head | None = None  # what the head file says
        self._end = self._size = 0  # bytes up to the end of the last whole line, and in all
        self._read()

    @property
    def head(self) -> Head:
        """Length and last digest, as they are now: what to keep elsewhere as proof that nothing was changed since."""
        return Head(len(self.bodies), self._digests[-1])

    def has_been(self, head: Head) -> bool:
        """Whether the chain had this head at some time: everything up to it is as it was then."""
        return 1 <= head.lines <= len(self._digests) and self._digests[head.lines - 1] == head.digest

    def catch_up(self) -> None:
        """Write the head again if a crash left it a line behind, so that this line cannot be cut off unseen; only for
        the process that may write.
        """
        if self._known != self.head:
            _write_head(self.path, self.head)
            self._known = self.head

    def _write(self, body: dict[str, Any]) -> None:
        """Add a line; returns once it is on the disk.

        Raises:
            LedgerError: another process added lines since the file was read; nothing was written.
            OSError: the disk is full or cannot be written; the file is as before.
        """
        line = _line(body, self._digests[-1])
        # Without buffering: what a failed flush (a full disk) left behind is cut off, so that no half line can
        # swallow the next entry.
        with open(self.path, "r+b", buffering=0) as f:
            if f.seek(0, os.SEEK_END) != self._size:
                raise LedgerError(
                    f"the {self.what} {self.path} has changed since it was read, so another process may be charging "
                    "the same budget; nothing was charged.  Let the other one end, then start again."
                )
            end = self._end
            f.truncate(end)  # the piece that a crash left
            self._size = end
            f.seek(end)
            data = line + b"\n"
            head = Head(len(self.bodies) + 1, _digest(line))
            try:
                # The line, on the disk, then the head: in this order a crash leaves a line too many, never one too few.
                if f.write(data) != len(data):
                    raise OSError(28, "No space left on device")
                os.fsync(f.fileno())
                _write_head(self.path, head)
            except OSError:
                # A head that got through although its writer failed keeps the line: charged too much, not too little.
                if _read_head(self.path, self.what) != head:
                    f.truncate(end)
                raise
        self._end = self._size = end + len(data)
        self.bodies.append(body)
        self._digests.append(_digest(line))
        self._known = self.head

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                # The head first, as it is written last: what is added meanwhile is a line more than it knows of.
                self._known = head = _read_head(self.path, self.what)
                data = file.read()
        except OSError as error:
            raise LedgerError(f"the {self.what} {self.path} cannot be read: {error.strerror}.") from None
        lines = data.split(b"\n")
        # Bytes, because the piece that a crash leaves may end within a character.
        partial = lines.pop()
        self._end, self._size = len(data) - len(partial), len(data)
        if not lines:
            raise LedgerError(f"the {self.what} {self.path} is empty.")
        previous = _GENESIS
        for number, line in enumerate(lines, 1):
            try:
                body = json.loads(line.decode())
                found = body.pop("previous")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise LedgerError(f"line {number} of the {self.what} {self.path} is not an entry.") from None
            if found != previous:
                raise LedgerError(
                    f"line {number} of the {self.what} {self.path} does not follow from the line before it: the file "
                    "was edited, truncated or reordered, so no ε can be stated from it."
                )
            # Each line's digest covers the one before it, so a change of any line breaks the chain from there on.
            previous = _digest(line)
            self._digests.append(previous)
            self.bodies.append(body)
        if not self.has_been(head):
            raise LedgerError(
                f"the {self.what} {self.path} has {len(lines)} lines that do not fit {_head_path(self.path).name}, "
                f"which knows of {head.lines}: lines were cut off, or the two files are not of the same time.  No ε "
                "can be stated from it."
            )
        if len(lines) > head.lines + 1:
            raise LedgerError(
                f"the {self.what} {self.path} has {len(lines) - head.lines} lines more than "
                f"{_head_path(self.path).name} knows of; a crash can leave one.  Something else wrote into it, so no ε "
                "can be stated from it."
            )


def start_chain(path: Path, what: str, first: dict[str, Any]) -> None:
    """Start a :class:`HashChain` with its first line.  It appears whole or not at all, with mode 0600.

    Raises LedgerError if the file is there already, or its head says that it was and had more lines.
    """
    if path.exists():
        raise LedgerError(f"{path} exists already; a {what} is never started twice.")
    head = _read_head(path, what) if _head_path(path).exists() else None
    if head is not None and head.lines > 1:
        raise LedgerError(
            f"the {what} {path} is gone, but {_head_path(path).name} says that it had {head.lines} lines: what it "
            "charged is no longer known.  Put it back from a backup, or start a new run."
        )
    line = _line(first, _GENESIS)
    # The head first: a chain without one is refused, as somebody may have cut it.
    _write_head(path, Head(1, _digest(line)))
    write_text(path, line.decode() + "\n", 0o600)


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _read_head(path: Path, what: str) -> Head:
    file = _head_path(path)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        head = Head(stored["lines"], stored["digest"])
        if type(head.lines) is not int or type(head.digest) is not str:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError(
            f"{file}, which says how the {what} ends, is missing or damaged, so lines may have been cut off and no ε "
            f"can be stated.  Put it back from a backup, unless {path.name} is no {what} at all."
        ) from None
    return head


def _write_head(path: Path, head: Head) -> None:
    write_text(_head_path(path), json.dumps(asdict(head)) + "\n", 0o600)


# ------------------------------------------------------------------------------------------------- the ledger


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
        return asdict(self)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> LedgerEntry:
        """The inverse.  Raises ValueError, KeyError or TypeError if something does not fit."""
        mechanism = body["mechanism"]
        entry = cls(body["kind"], str(body["reason"]), mechanism and Mechanism(**mechanism), dict(body["details"]))
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
            f"refused: the total would come to ε = {rounded_up(total, 4)} at δ = {delta:.3g}{group}, above the {whose} "
            f"ε = {target:.4g}.  Take fewer steps, add noise, or raise the target if your policy allows it."
        )


class Ledger(HashChain):
    """The accesses to one data set by one run, and the budget that they may not exceed; see :meth:`create`.

    Attributes:
        entries: the accesses, in order.
        target_epsilon: ε that the total may not exceed; ``math.inf`` for a non-private reference.
        delta, group_size: δ and g: ε is for up to g records together.
        records: declared number of records n.
        run: a name of the run that nobody can choose, derived from its secret key.
        secure: False if the noise came from a reproducible seed, so that ε is not a guarantee.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ledger")
        self._affordable: list[dict[tuple[float, float], int]] = []
        self.entries: list[LedgerEntry] = []
        header, *bodies = self.bodies
        if header.get("format") != FORMAT:
            raise LedgerError(
                f"the ledger {path} is of format {header.get('format')!r}, but this version reads format {FORMAT}.  "
                "Use the version of dpsyngen that made it."
            )
        number = 1
        try:
            self.target_epsilon = float(header["target_epsilon"])
            self.delta, self.records = float(header["delta"]), int(header["records"])
            self.group_size, self.run = header["group_size"], str(header["run"])
            check_group_size(self.group_size)
            self.secure = header["randomness"] == "operating system"
            for body in bodies:
                number += 1
                self.entries.append(LedgerEntry.from_dict(body))
        except (KeyError, TypeError, ValueError) as error:
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
    ) -> Ledger:
        """Start a ledger in a new file; the arguments are the attributes."""
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
        start_chain(path, "ledger", header)
        return cls(path)

    # ------------------------------------------------------------------------------------------ reading

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
        """Total ε of the ledger, at its δ and group size or others; infinite after a non-private access."""
        if self.non_private:
            return math.inf
        g = self.group_size if group_size is None else group_size
        return epsilon(self.mechanisms, self.delta if delta is None else delta, accountant, g)

    # ------------------------------------------------------------------------------------------ writing

    def charge(self, mechanism: Mechanism, reason: str, **details: Any) -> None:
        """Write down a mechanism that is about to run; returns once the line is on the disk.

        BudgetExceeded if the total would exceed the target: nothing was written and nothing may be run.
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
        self._write(entry.to_dict())
        self.entries.append(entry)
