"""The ledger: on the disk before use, refuses what exceeds the budget, refuses to be edited."""

from __future__ import annotations

import math
import os

import pytest

from dpsyngen.errors import BudgetExceeded, LedgerError
from dpsyngen.privacy import ledger as ledger_module
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.ledger import Ledger

STEP = Mechanism(0.1, 2.0, 10)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.jsonl", target_epsilon=3.0, delta=1e-5, records=1000)


def test_charge_is_on_the_disk_when_it_returns(ledger, monkeypatch) -> None:
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    ledger.charge(STEP, "why", query="q", steps=10)
    assert synced[0] == os.path.realpath(ledger.path)  # before its head, which vouches for it
    assert len(synced) > 1
    again = Ledger(ledger.path)
    assert again.mechanisms == (STEP,)
    assert again.entries[0].reason == "why"
    assert again.entries[0].details == {"query": "q", "steps": 10}
    assert again.epsilon() == ledger.epsilon() == epsilon([STEP], 1e-5)
    assert (again.delta, again.target_epsilon, again.records) == (1e-5, 3.0, 1000)


def test_budget_is_never_exceeded_and_a_refusal_leaves_no_trace(ledger) -> None:
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExceeded, match="above the target"):
        ledger.charge(Mechanism(1.0, 0.5), "too much")
    assert ledger.path.read_bytes() == before
    charged = 0
    while epsilon([STEP] * (charged + 1), 1e-5) <= 3.0:
        ledger.charge(STEP, "steps")
        charged += 1
    assert charged > 1
    with pytest.raises(BudgetExceeded):
        ledger.charge(STEP, "one block too many")
    assert Ledger(ledger.path).mechanisms == (STEP,) * charged
    assert Ledger(ledger.path).epsilon() <= 3.0


def edit(ledger: Ledger, change) -> None:
    lines = ledger.path.read_text().split("\n")
    ledger.path.write_text("\n".join(change(lines)))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: [*x[:1], x[1].replace('"count": 10', '"count": 11'), *x[2:]],
        lambda x: [x[0].replace("1e-05", "1e-06"), *x[1:]],
        lambda x: [x[0].replace("3.0", "30.0"), *x[1:]],
        lambda x: [x[0], x[2], x[1], *x[3:]],
        lambda x: [x[0], *x[2:]],
        lambda x: x[1:],
        lambda x: [x[0], x[1][:-5], *x[2:]],
        lambda x: [x[0], "", *x[1:]],
        lambda x: [],
    ],
)
def test_edited_reordered_or_cut_ledgers_are_refused(ledger, change) -> None:
    for _ in range(3):
        ledger.charge(STEP, "steps")
    edit(ledger, change)
    with pytest.raises(LedgerError):
        Ledger(ledger.path)


def test_half_written_line_of_a_crash_is_no_access(ledger) -> None:
    ledger.charge(STEP, "one")
    whole = ledger.path.read_bytes()
    with open(ledger.path, "ab") as f:
        f.write(b'{"kind": "dp", "reas')
    again = Ledger(ledger.path)
    assert again.mechanisms == (STEP,)
    again.charge(STEP, "two")
    assert ledger.path.read_bytes().startswith(whole)
    assert Ledger(ledger.path).mechanisms == (STEP, STEP)


def test_a_line_that_is_written_meanwhile_is_no_damage(ledger, monkeypatch) -> None:
    read = ledger_module._read_head

    def charging(path, what):
        with monkeypatch.context() as m:
            m.setattr(ledger_module, "_read_head", read)
            ledger.charge(STEP, "before the head is read")
            head = read(path, what)
            ledger.charge(STEP, "after it")
        return head

    monkeypatch.setattr(ledger_module, "_read_head", charging)
    assert Ledger(ledger.path).mechanisms == (STEP, STEP)


def test_failed_write_leaves_the_ledger_as_it_was(ledger, monkeypatch) -> None:
    ledger.charge(STEP, "one")
    before = ledger.path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            ledger.charge(STEP, "two")
    assert ledger.path.read_bytes() == before
    assert ledger.mechanisms == (STEP,)
    ledger.charge(STEP, "three")
    assert [e.reason for e in Ledger(ledger.path).entries] == ["one", "three"]


def test_private_looks_are_written_down_and_cost_nothing(ledger) -> None:
    ledger.charge(STEP, "steps")
    before = ledger.epsilon()
    ledger.note_private_access("evaluation", features=["pixels"])
    again = Ledger(ledger.path)
    assert again.epsilon() == before
    assert [e.kind for e in again.entries] == ["dp", "private"]


def test_access_without_noise_makes_epsilon_infinite(tmp_path, ledger) -> None:
    reference = Ledger.create(tmp_path / "inf", target_epsilon=math.inf, delta=1e-5, records=10)
    reference.charge(Mechanism(0.5, 0.0, 5), "reference")
    assert math.isinf(Ledger(reference.path).epsilon())
    assert Ledger(reference.path).entries[0].kind == "non-private"
    with pytest.raises(BudgetExceeded):
        ledger.charge(Mechanism(0.5, 0.0, 5), "not here")


def test_never_started_twice_and_missing_file(ledger, tmp_path) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(ledger.path, target_epsilon=1, delta=1e-5, records=10)
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path / "none")
