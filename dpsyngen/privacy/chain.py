"""A file of JSON lines that can only grow: each line carries the SHA-256 of the line before it.

A chain shows that a line was edited, dropped or moved, but not that its end was cut off.  So the number of lines and
the digest of the last one are kept in a second file, the head (``NAME.head``), which is written after the line:

=========================  ===========================================================================
a crash                    leaves
=========================  ===========================================================================
while a line is written    a piece without its newline, which counts for nothing
before the head is         one whole line more than the head knows, which counts
=========================  ===========================================================================

Anything else that does not fit together is refused.  Who may write into the folder can forge both files; what stands
against that is a copy of the head elsewhere (:attr:`Head`): a certificate holds one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.errors import LedgerError
from dpsyngen.files import write_text

_GENESIS = "0" * 64


@dataclass(frozen=True)
class Head:
    """How long a chain is and how it ends.

    Attributes:
        lines: number of lines, the first included.
        digest: SHA-256 of the last line, 64 hexadecimal digits.
    """

    lines: int
    digest: str


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _line(body: dict[str, Any], previous: str) -> bytes:
    return json.dumps({**body, "previous": previous}, sort_keys=True, ensure_ascii=False).encode()


class HashChain:
    """An append-only file of JSON objects.

    Args:
        path: an existing file (see :meth:`create`).
        what: what the file is called in messages, such as "ledger".

    Attributes:
        records: the objects, without the digests that chain them.

    Raises:
        LedgerError: the file was edited, truncated or reordered, or its head is missing or does not fit.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.head_path = _head_path(path)
        self.records: list[dict[str, Any]] = []
        self._digests: list[str] = []
        self._known: Head | None = None  # what the head file says
        self._end = self._size = 0  # bytes up to the end of the last whole line, and in all
        self._read()

    @classmethod
    def create(cls, path: Path, what: str, first: dict[str, Any]) -> HashChain:
        """Start a file with its first line.  It appears whole or not at all, with mode 0600.

        Raises:
            LedgerError: the file is there already, or its head says that it was and had more lines.
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
        return cls(path, what)

    @property
    def head(self) -> Head:
        """Length and last digest, as they are now."""
        return Head(len(self.records), self._digests[-1])

    def has_been(self, head: Head) -> bool:
        """Whether the chain had this head at some time: everything up to it is as it was then."""
        return 1 <= head.lines <= len(self._digests) and self._digests[head.lines - 1] == head.digest

    def catch_up(self) -> None:
        """Write the head again if a crash left it a line behind, so that this line cannot be cut off unseen."""
        if self._known != self.head:
            _write_head(self.path, self.head)
            self._known = self.head

    def append(self, body: dict[str, Any]) -> None:
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
            f.truncate(end)
            self._size = end
            f.seek(end)
            data = line + b"\n"
            head = Head(len(self.records) + 1, _digest(line))
            try:
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
        self.records.append(json.loads(line))
        self.records[-1].pop("previous")
        self._digests.append(_digest(line))
        self._known = self.head

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
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
            previous = _digest(line)
            self._digests.append(previous)
            self.records.append(body)
        self._known = head = _read_head(self.path, self.what)
        if not self.has_been(head):
            raise LedgerError(
                f"the {self.what} {self.path} has {len(lines)} lines that do not fit {self.head_path.name}, which "
                f"knows of {head.lines}: lines were cut off, or the two files are not of the same time.  No ε can be "
                "stated from it."
            )
        if len(lines) > head.lines + 1:
            raise LedgerError(
                f"the {self.what} {self.path} has {len(lines) - head.lines} lines more than {self.head_path.name} "
                "knows of; a crash can leave one.  Something else wrote into it, so no ε can be stated from it."
            )


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _read_head(path: Path, what: str) -> Head:
    file = _head_path(path)
    try:
        stored = json.loads(file.read_text())
        head = Head(stored["lines"], stored["digest"])
        if type(head.lines) is not int or type(head.digest) is not str:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError(
            f"{file}, which says how the {what} ends, is missing or damaged, so lines may have been cut off and no ε "
            "can be stated.  Put it back from a backup."
        ) from None
    return head


def _write_head(path: Path, head: Head) -> None:
    write_text(_head_path(path), json.dumps({"lines": head.lines, "digest": head.digest}) + "\n", 0o600)
