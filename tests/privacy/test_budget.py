"""The budget of a data set: charged before a run begins, shared by runs, never exceeded."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dpsyngen.errors import BudgetExceeded, ConfigError, LedgerError
from dpsyngen.privacy import ledger
from dpsyngen.privacy.accounting import Mechanism, calibrate_noise, epsilon
from dpsyngen.privacy.budget import Budget

RUN = Mechanism(0.1, 2.0, 20)
IMAGES = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Budget.create(tmp_path / "budget.jsonl", epsilon_limit=3.0, delta=1e-5)
    return tmp_path / "budget.jsonl"


def test_runs_add_up_and_the_limit_holds(path) -> None:
    taken = 0
    while epsilon([Mechanism(0.1, 2.0, 20 * (taken + 1))], 1e-5) <= 3.0:
        Budget(path).reserve(f"run{taken}", "r", (RUN,), IMAGES)
        taken += 1
    assert taken > 1
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded, match=r"above the budget of .*budget\.jsonl, ε = 3"):
        Budget(path).reserve("last", "r", (RUN,), IMAGES)
    assert path.read_bytes() == before
    budget = Budget(path)
    assert budget.epsilon() == epsilon([Mechanism(0.1, 2.0, 20 * taken)], 1e-5) <= 3.0
    assert budget.epsilon("rdp") > budget.epsilon()


def test_a_refusal_says_what_would_fit(path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    with pytest.raises(BudgetExceeded, match=r"a run of ε = [0-9.]+ at --delta 1e-05 on its own would fit") as refused:
        Budget(path).reserve("two", "r", (Mechanism(0.1, 0.9, 20),), IMAGES)
    fits = float(re.findall(r"ε = ([0-9.]+) at --delta", str(refused.value))[0])
    noise = calibrate_noise(fits * 0.99, 1e-5, sampling_rate=0.1, steps=20)
    Budget(path).reserve("two", "r", (Mechanism(0.1, noise, 20),), IMAGES)
    assert 2.8 < Budget(path).epsilon() <= 3.0
    full = Budget.create(path.with_name("full"), epsilon_limit=epsilon([RUN], 1e-5), delta=1e-5)
    full.reserve("one", "r", (RUN,), IMAGES)
    with pytest.raises(BudgetExceeded, match="Nothing of it is left"):
        full.reserve("two", "r", (RUN,), IMAGES)


def test_runs_for_persons_and_runs_for_images_share_no_budget(path) -> None:
    def persons(run: str, file: Path) -> None:
        Budget(file).reserve(run, "r", (RUN,), IMAGES, most_per_person=2)

    with pytest.raises(ConfigError, match="a budget for 1 images together, and this run uses up to 2 of each person"):
        persons("one", path)
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    with pytest.raises(ConfigError, match="protect images and this one would protect persons"):
        persons("two", path)
    other = path.with_name("other")
    Budget.create(other, epsilon_limit=9, delta=1e-5, group_size=2)
    persons("one", other)
    before = other.read_bytes()
    with pytest.raises(ConfigError, match="protect persons and this one would protect images"):
        Budget(other).reserve("two", "r", (RUN,), IMAGES)
    assert other.read_bytes() == before
    # Given up, it counts with its steps, and still for persons.
    Budget(other).settle("one", [RUN])
    assert Budget(other).by_person
    assert not Budget(path).by_person


def test_a_file_that_does_not_say_whom_its_runs_protect_is_damaged(path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    old = path.with_name("old")
    budget = Budget.create(old, epsilon_limit=9, delta=1e-5, group_size=2)
    line = json.loads(path.read_text().splitlines()[1])
    budget._write({k: line[k] for k in ("run", "name", "mechanisms", "settled", "data")})
    with pytest.raises(LedgerError, match=r"is damaged: KeyError.'by_person'"):
        Budget(old)


def test_a_run_is_charged_once_however_often_it_is_resumed(path) -> None:
    for _ in range(3):
        Budget(path).reserve("one", "r", (RUN,), IMAGES)
    assert Budget(path).mechanisms() == (RUN,)
    with pytest.raises(LedgerError, match="configuration was changed"):
        Budget(path).reserve("one", "r", (Mechanism(0.1, 2.0, 21),), IMAGES)
    assert Budget(path).mechanisms() == (RUN,)


def test_settled_run_counts_with_what_it_did_and_never_goes_on(path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    Budget(path).reserve("two", "r", (RUN,), IMAGES)
    Budget(path).settle("one", [Mechanism(0.1, 2.0, 2), Mechanism(0.1, 2.0, 3)])
    assert Budget(path).mechanisms() == (Mechanism(0.1, 2.0, 25),)
    with pytest.raises(BudgetExceeded, match="given up"):
        Budget(path).reserve("one", "r", (RUN,), IMAGES)
    Path(f"{path}.lock").unlink()
    for run, why in (("one", "settled already"), ("three", "no such run")):
        with pytest.raises(LedgerError, match=why):
            Budget(path).settle(run, [])
    assert not Path(f"{path}.lock").exists()  # what is refused makes no file
    Budget(path).settle("two", [])  # it had not taken a step
    assert Budget(path).mechanisms() == (Mechanism(0.1, 2.0, 5),)


def test_runs_that_start_at_once_do_not_overspend(path, monkeypatch) -> None:
    """Each reads the file again under its lock before it decides."""
    budgets, decide = [Budget(path) for _ in range(12)], Budget.require

    def slowly(self: Budget, *args: object) -> None:
        decide(self, *args)  # type: ignore[arg-type]
        time.sleep(0.05)  # long enough for all others to have decided, too, were they let in

    monkeypatch.setattr(Budget, "require", slowly)

    def reserve(i: int) -> bool:
        try:
            budgets[i].reserve(f"run{i}", "r", (RUN,), IMAGES)
        except BudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        taken = sum(pool.map(reserve, range(12)))
    assert 1 < taken < 12
    budget = Budget(path)
    assert len(budget.charges) == taken
    assert budget.epsilon() <= 3.0


def test_other_images_are_refused_unless_the_set_may_grow(tmp_path, path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    with pytest.raises(ConfigError, match="other images"):
        Budget(path).reserve("two", "r", (RUN,), "cd" * 32)
    growing = Budget.create(tmp_path / "g", epsilon_limit=9.0, delta=1e-5, growing=True)
    growing.reserve("one", "r", (RUN,), IMAGES)
    growing.reserve("two", "r", (RUN,), "cd" * 32)
    assert growing.mechanisms() == (Mechanism(0.1, 2.0, 40),)


def test_the_file_does_not_hold_the_fingerprint_itself(path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    assert IMAGES not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_group_budget_costs_more(tmp_path) -> None:
    budget = Budget.create(tmp_path / "b", epsilon_limit=9.0, delta=1e-5, group_size=3)
    budget.reserve("one", "r", (RUN,), IMAGES)
    assert Budget(budget.path).epsilon() == epsilon([RUN], 1e-5, group_size=3) > 3 * epsilon([RUN], 1e-5)


def test_training_without_noise_is_refused(path) -> None:
    with pytest.raises(BudgetExceeded, match="without noise"):
        Budget(path).reserve("one", "r", (Mechanism(0.1, 0.0, 1),), IMAGES)


@pytest.mark.parametrize(
    "values",
    [
        *({"epsilon_limit": e} for e in (0, 1e-4, 10_001, float("inf"), float("nan"))),
        *({"delta": delta} for delta in (0, 0.011, 1)),
        {"group_size": 0},
    ],
)
def test_bad_values_and_those_that_training_would_refuse(values, tmp_path) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Budget.create(tmp_path / "b", **{"epsilon_limit": 1.0, "delta": 1e-5, **values})
    assert not (tmp_path / "b").exists()


def test_of_budgets_started_at_once_under_one_name_one_is_made(tmp_path, monkeypatch) -> None:
    write = ledger._write_head

    def slowly(*given: Any) -> None:
        time.sleep(0.2)  # long enough for all others to have begun
        write(*given)

    monkeypatch.setattr(ledger, "_write_head", slowly)

    def create(i: int) -> Budget | None:
        try:
            return Budget.create(tmp_path / "b", epsilon_limit=1.0 + i, delta=1e-5)
        except (ConfigError, LedgerError):
            return None

    with ThreadPoolExecutor(8) as threads:
        made = [budget for budget in threads.map(create, range(8)) if budget is not None]
    assert len(made) == 1
    assert Budget(tmp_path / "b").bodies == made[0].bodies


def test_edited_and_foreign_files(path, tmp_path) -> None:
    Budget(path).reserve("one", "r", (RUN,), IMAGES)
    text = path.read_text()
    path.write_text(text.replace('"count": 20', '"count": 2'))
    with pytest.raises(LedgerError):
        Budget(path)
    path.write_text(text.split("\n")[0] + "\n")
    with pytest.raises(LedgerError, match="cut off"):
        Budget(path)
    with pytest.raises(LedgerError, match="cannot be read"):
        Budget(tmp_path / "none")
    with pytest.raises(ConfigError, match="exists already"):
        Budget.create(path, epsilon_limit=1.0, delta=1e-5)
    from dpsyngen.privacy.ledger import Ledger

    Ledger.create(tmp_path / "ledger", target_epsilon=1.0, delta=1e-5, records=10)
    with pytest.raises(LedgerError, match="not a budget file"):
        Budget(tmp_path / "ledger")
    assert json.loads((tmp_path / "ledger").read_text())["format"] == 2


# ------------------------------------------------------------------------------------- runs of several mechanisms

MOMENTS = (Mechanism(1.0, 9.0, 1), Mechanism(1.0, 6.0, 1), Mechanism(1.0, 6.0, 1))


def test_all_that_a_run_does_is_reserved_together(path) -> None:
    Budget(path).reserve("one", "r", (*MOMENTS, RUN), IMAGES)
    budget = Budget(path)
    assert budget.mechanisms() == (RUN, Mechanism(1.0, 6.0, 2), Mechanism(1.0, 9.0, 1))
    assert budget.epsilon() == epsilon([*MOMENTS, RUN], 1e-5) > epsilon([RUN], 1e-5)


def test_the_whole_of_a_run_must_fit_even_where_each_part_would(path) -> None:
    noise = calibrate_noise(2.9, 1e-5, sampling_rate=0.1, steps=20)
    steps = Mechanism(0.1, noise, 20)
    query = Mechanism(1.0, calibrate_noise(2.9, 1e-5, sampling_rate=1.0, steps=1), 1)
    for alone in ((steps,), (query,)):
        Budget(path).require(alone)
    before = path.read_bytes()
    for order in ((query, steps), (steps, query)):
        with pytest.raises(BudgetExceeded, match="above the budget"):
            Budget(path).reserve("one", "r", order, IMAGES)
    assert path.read_bytes() == before


def test_a_refused_run_of_several_mechanisms_is_told_what_would_fit(path) -> None:
    Budget(path).reserve("one", "r", (*MOMENTS, RUN), IMAGES)
    with pytest.raises(BudgetExceeded, match=r"a run of ε = [0-9.]+ at --delta 1e-05 on its own would fit") as refused:
        Budget(path).reserve("two", "r", (*MOMENTS, Mechanism(0.1, 0.9, 20)), IMAGES)
    fits = float(re.findall(r"ε = ([0-9.]+) at --delta", str(refused.value))[0])
    noise = calibrate_noise(fits * 0.97, 1e-5, sampling_rate=0.1, steps=20, spent=MOMENTS)
    Budget(path).reserve("two", "r", (*MOMENTS, Mechanism(0.1, noise, 20)), IMAGES)
    assert Budget(path).epsilon() <= 3.0


def test_resuming_a_run_of_several_mechanisms(path) -> None:
    """However the same mechanisms are listed; but no other ones, and not one of them left out."""
    Budget(path).reserve("one", "r", (*MOMENTS, RUN), IMAGES)
    Budget(path).reserve("one", "r", (RUN, *MOMENTS), IMAGES)
    assert len(Budget(path).charges) == 1
    for other in (MOMENTS, (RUN,), (*MOMENTS[:2], RUN), (*MOMENTS, Mechanism(0.1, 2.0, 21))):
        with pytest.raises(LedgerError, match="configuration was changed"):
            Budget(path).reserve("one", "r", other, IMAGES)


def test_one_mechanism_without_noise_is_enough_to_refuse(path) -> None:
    for mechanisms in ((Mechanism(1.0, 0.0, 1), RUN), (*MOMENTS, Mechanism(0.1, 0.0, 20))):
        with pytest.raises(BudgetExceeded, match="without noise"):
            Budget(path).require(mechanisms)


def test_a_run_that_got_no_further_than_its_moments_is_settled_with_these(path) -> None:
    Budget(path).reserve("one", "r", (*MOMENTS, RUN), IMAGES)
    Budget(path).settle("one", MOMENTS[:2])
    assert Budget(path).mechanisms() == (MOMENTS[1], MOMENTS[0])
