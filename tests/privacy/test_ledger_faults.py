"""The ledger when things go wrong: crashes, full disks, two writers, damaged last lines."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest

import dpsyngen.files as files_module
import dpsyngen.privacy.ledger as chain_module
from dpsyngen.errors import BudgetExceeded, LedgerError
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.ledger import Ledger

STEP = Mechanism(0.1, 2.0, 10)
FULL = OSError(28, "No space left on device")


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", target_epsilon=3.0, delta=1e-5, records=1000)
    ledger.charge(STEP, "one")
    return ledger


def append(ledger: Ledger, data: bytes) -> None:
    with open(ledger.path, "ab") as f:
        f.write(data)


def head_of(ledger: Ledger) -> Path:
    return ledger.path.with_name(ledger.path.name + ".head")


def forge_head(ledger: Ledger) -> None:
    """As someone would who edits the ledger and knows of the head."""
    lines = ledger.path.read_bytes().split(b"\n")[:-1]
    head_of(ledger).write_text(json.dumps({"lines": len(lines), "digest": hashlib.sha256(lines[-1]).hexdigest()}))


def reasons(ledger: Ledger) -> list[str]:
    return [e.reason for e in Ledger(ledger.path).entries]


@pytest.mark.parametrize("cut", [*range(1, 12), 40, 100, -2, -1])
def test_crash_anywhere_within_a_line(ledger, cut) -> None:
    """Some letters take several bytes, so that the cut also falls within a letter; -1 leaves out only the newline."""
    before, head = ledger.path.read_bytes(), head_of(ledger).read_bytes()
    ledger.charge(STEP, "\u03b5\u03b4\u03c3\u03c4 " * 4, path="b\u00fccher/\u56fe")
    new = ledger.path.read_bytes()[len(before) :]
    start = new.index("b\u00fc".encode())
    ledger.path.write_bytes(before + new[: start + cut if cut > 0 else cut])
    head_of(ledger).write_bytes(head)  # written after the line, so a crash within the line leaves the old one
    again = Ledger(ledger.path)
    assert again.mechanisms == (STEP,)
    again.charge(STEP, "two")
    assert reasons(ledger) == ["one", "two"]


def test_full_disk_after_a_crash_does_not_eat_the_entry_before(ledger, monkeypatch) -> None:
    append(ledger, b'{"kind": "dp", "details": {"half": "wri')
    again = Ledger(ledger.path)

    def full(fd: int) -> None:
        raise FULL

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                again.charge(STEP, "no")
    again.charge(STEP, "two")
    assert reasons(ledger) == ["one", "two"]


@pytest.mark.parametrize("written", [0, 1, 25])
def test_disk_that_takes_part_of_a_line(ledger, monkeypatch, written) -> None:
    before = ledger.path.read_bytes()
    real = builtins.open

    class Short(io.FileIO):
        def write(self, data) -> int:
            return super().write(bytes(data)[:written])

    with monkeypatch.context() as m:
        m.setattr(
            builtins,
            "open",
            lambda path, mode="r", **k: Short(path, "r+") if mode == "r+b" else real(path, mode, **k),
        )
        with pytest.raises(OSError, match="No space"):
            ledger.charge(STEP, "no")
    assert ledger.path.read_bytes() == before
    assert ledger.mechanisms == (STEP,)
    ledger.charge(STEP, "two")
    assert reasons(ledger) == ["one", "two"]


def test_second_writer_neither_overspends_nor_breaks_the_file(ledger) -> None:
    """A ledger read before another one charged knows too little to check the budget."""
    stale = Ledger(ledger.path)
    ledger.charge(STEP, "two")
    with pytest.raises(LedgerError, match="changed since"):
        stale.charge(STEP, "three")
    with pytest.raises(LedgerError, match="changed since"):
        stale.note_private_access("look")
    assert reasons(ledger) == ["one", "two"]
    assert stale.mechanisms == (STEP,)
    Ledger(ledger.path).charge(STEP, "three")
    assert reasons(ledger) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"[1]\n", b"1\n", b"null\n", b"{}\n", b"\n", b'{"previous": "x"}\n', b"\x00" * 50 + b"\n"]
)
def test_foreign_lines_are_ledger_errors(ledger, line) -> None:
    append(ledger, line)
    with pytest.raises(LedgerError):
        Ledger(ledger.path)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"reason"', '"raison"'), ('"kind"', '"kin"'), ("2.0", "-2.0"), ("0.1", "NaN"), ('"count"', '"number"')],
)
def test_last_line_that_makes_no_sense_is_a_ledger_error(ledger, old, new) -> None:
    lines = ledger.path.read_text().split("\n")
    assert old in lines[-2]
    ledger.path.write_text("\n".join([*lines[:-2], lines[-2].replace(old, new), ""]))
    forge_head(ledger)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(ledger.path)


def test_lines_cut_off_the_end_are_missed(ledger) -> None:
    """The chain alone cannot see it: what is left is a whole chain."""
    for name in ("two", "three"):
        ledger.charge(STEP, name)
    lines = ledger.path.read_bytes().split(b"\n")
    for kept in (1, 2, 3):
        ledger.path.write_bytes(b"\n".join(lines[:kept]) + b"\n")
        with pytest.raises(LedgerError, match="cut off"):
            Ledger(ledger.path)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{}", b"[]", b"{", b'{"lines": "2", "digest": "x"}', b'{"lines": 2}', b"[" * 5000, b"\xff\xfe"],
)
def test_without_its_head_a_ledger_states_nothing(ledger, content) -> None:
    head_of(ledger).unlink()
    if content is not None:
        head_of(ledger).write_bytes(content)
    with pytest.raises(LedgerError, match="no ε can be stated"):
        Ledger(ledger.path)


def test_crash_between_a_line_and_its_head_keeps_the_charge(ledger) -> None:
    head = head_of(ledger).read_bytes()
    ledger.charge(STEP, "two")
    head_of(ledger).write_bytes(head)
    again = Ledger(ledger.path)
    assert again.mechanisms == (STEP, STEP)
    again.charge(STEP, "three")
    assert reasons(ledger) == ["one", "two", "three"]
    head_of(ledger).write_bytes(head)  # two lines more than it knows of: no crash does that
    with pytest.raises(LedgerError, match="lines more than"):
        Ledger(ledger.path)


def test_head_that_cannot_be_written_leaves_the_ledger_as_it_was(ledger, monkeypatch) -> None:
    before = ledger.path.read_bytes(), head_of(ledger).read_bytes()

    def full(path, write, mode) -> None:
        raise FULL

    with monkeypatch.context() as m:
        m.setattr(files_module, "write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            ledger.charge(STEP, "no")
    assert (ledger.path.read_bytes(), head_of(ledger).read_bytes()) == before
    ledger.charge(STEP, "two")
    assert reasons(ledger) == ["one", "two"]


def test_head_that_got_through_although_its_writer_failed_keeps_the_charge(ledger, monkeypatch) -> None:
    """The folder's flush comes after the rename, so it can fail when the new head is there."""
    real = files_module.write_atomically

    def late(path, write, mode) -> None:
        real(path, write, mode)
        raise FULL

    with monkeypatch.context() as m:
        m.setattr(files_module, "write_atomically", late)
        with pytest.raises(OSError, match="No space"):
            ledger.charge(STEP, "two")
    assert reasons(ledger) == ["one", "two"]


def test_lost_ledger_is_not_started_again(ledger) -> None:
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        Ledger.create(ledger.path, target_epsilon=3.0, delta=1e-5, records=1000)


def test_crash_while_a_ledger_is_made_does_not_block_it(tmp_path, monkeypatch) -> None:
    """Killed after the head, before the ledger."""
    with monkeypatch.context() as m:
        m.setattr(chain_module, "write_text", _only_the_first(chain_module.write_text))
        with pytest.raises(KeyboardInterrupt):
            Ledger.create(tmp_path / "l", target_epsilon=3.0, delta=1e-5, records=1000)
    assert not (tmp_path / "l").exists()
    assert (tmp_path / "l.head").exists()
    Ledger.create(tmp_path / "l", target_epsilon=2.0, delta=1e-5, records=1000).charge(STEP, "one")


def _only_the_first(real):
    calls = []

    def write(*args) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        real(*args)

    return write


def test_a_head_kept_elsewhere_shows_a_ledger_that_was_forged_whole(ledger) -> None:
    ledger.charge(STEP, "two")
    kept = ledger.head
    ledger.charge(STEP, "three")
    assert Ledger(ledger.path).has_been(kept)
    lines = ledger.path.read_bytes().split(b"\n")[:-1]
    ledger.path.write_bytes(b"\n".join(lines[:2]) + b"\n")
    forge_head(ledger)
    assert not Ledger(ledger.path).has_been(kept)


@pytest.mark.parametrize("content", [b"", b'{"format": 1', b"{}\n", b'{"previous": "%s"}\n' % (b"0" * 64)])
def test_damaged_header(tmp_path, content) -> None:
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger(tmp_path / "l")


def test_target_that_is_no_number_permits_nothing(tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "l", target_epsilon=math.nan, delta=1e-5, records=10)
    with pytest.raises(BudgetExceeded):
        ledger.charge(STEP, "steps")


def test_every_line_carries_the_digest_of_the_one_before(ledger) -> None:
    ledger.charge(STEP, "two")
    ledger.note_private_access("look")
    lines = ledger.path.read_bytes().split(b"\n")[:-1]
    assert json.loads(lines[0])["previous"] == "0" * 64
    for a, b in pairwise(lines):
        assert json.loads(b)["previous"] == hashlib.sha256(a).hexdigest()


def test_file_of_the_ledger_is_the_owners(ledger) -> None:
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_non_private_access_stays_infinite_whatever_follows(tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "l", target_epsilon=math.inf, delta=1e-5, records=10)
    ledger.charge(STEP, "private steps")
    assert ledger.epsilon() == epsilon([STEP], 1e-5)
    ledger.charge(Mechanism(0.1, 0.0, 1), "one step without noise")
    ledger.charge(STEP, "private steps")
    assert math.isinf(Ledger(ledger.path).epsilon())
    assert math.isinf(Ledger(ledger.path).epsilon(1e-3, "rdp"))


def test_charges_pile_up_over_reopened_ledgers(ledger) -> None:
    """ε after resumes is that of all the steps, never of the last session's."""
    for _ in range(3):
        Ledger(ledger.path).charge(STEP, "steps")
    assert Ledger(ledger.path).epsilon() == epsilon([Mechanism(0.1, 2.0, 40)], 1e-5)
