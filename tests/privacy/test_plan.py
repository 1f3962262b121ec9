"""The budget table: its figures are those of the accountant."""

from __future__ import annotations

import pytest

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.budget import neighbouring_plans, plan_lines


def budget_table(records: int, batch: int, steps: int, **options) -> list[str]:
    delta, plans = neighbouring_plans(records, batch, steps, **options)
    return list(plan_lines(records, options.get("group_size", 1), delta, plans))


def rows(lines: list[str]) -> list[list[str]]:
    return [line.replace(",", "").split() for line in lines if " C" in line and line.strip()[0].isdigit()]


def test_noise_for_a_budget() -> None:
    lines = budget_table(100, 100, 1, epsilon=2.0)
    plans = rows(lines)
    assert "<- asked" in next(line for line in lines if "asked" in line)
    assert [int(r[0]) for r in plans] == [1, 2, 1]
    assert [int(r[1]) for r in plans] == [100, 100, 50]
    for steps, batch, _, epochs, noise, pld, rdp, per_step, *_ in plans:
        assert 1.99 < float(pld) <= 2.0 < float(rdp)
        actual = epsilon([Mechanism(int(batch) / 100, float(noise), int(steps))], 1e-3)
        assert actual == pytest.approx(float(pld), rel=2e-3)
        assert float(epochs) == pytest.approx(int(batch) * int(steps) / 100)
        assert float(per_step) == pytest.approx(float(noise) / int(batch), abs=2e-6)


def test_bounds_are_rounded_up() -> None:
    for noise in (4.0, 5.0, 6.0, 7.0):
        options = {"noise_multiplier": noise, "delta": 1e-5}
        _, plans = neighbouring_plans(1000, 1000, 2, **options)
        for row, plan in zip(rows(budget_table(1000, 1000, 2, **options)), plans, strict=True):
            assert plan.epsilon <= float(row[5]) < plan.epsilon + 1e-4
            assert plan.epsilon_by_rdp <= float(row[6]) < plan.epsilon_by_rdp + 1e-4


def test_cost_of_a_noise() -> None:
    lines = budget_table(1000, 1000, 2, noise_multiplier=5.0, delta=1e-5)
    assert "δ = 1e-05" in lines[0]
    assert "one image = one record" in lines[0]
    first = next(r for r in rows(lines) if "asked" in r)
    assert float(first[5]) == pytest.approx(epsilon([Mechanism(1.0, 5.0, 2)], 1e-5), abs=1e-4)
    # A batch above the number of records is not proposed.
    assert all(int(r[1]) <= 1000 for r in rows(lines))


def test_groups() -> None:
    lines = budget_table(100, 100, 1, noise_multiplier=8.0, group_size=4)
    assert "up to 4 images of one person together" in lines[0]
    first = next(r for r in rows(lines) if "asked" in r)
    assert float(first[5]) == pytest.approx(epsilon([Mechanism(1.0, 2.0, 1)], 1e-3), abs=1e-4)


def test_the_plan_says_how_each_figure_was_computed() -> None:
    text = "\n".join(budget_table(100, 100, 1, epsilon=2.0))
    assert "ε of 1 steps of batch 100: by privacy loss distribution (upper bound, losses in steps of 0.000" in text
    text = "\n".join(budget_table(60_000, 512, 300, noise_multiplier=0.003))
    assert "by closed form of the Gaussian mechanism without sampling (upper bound; beyond ε = 10,000" in text


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 0},
        {"epsilon": 1.0, "noise_multiplier": 1.0},
        {"epsilon": None},
        {"epsilon": 0.0},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"epsilon": 1e5},
        {"epsilon": None, "noise_multiplier": 0.0},
        {"epsilon": None, "noise_multiplier": 1e-200},
        {"records": 0},
        {"steps": 0},
        {"steps": 10**7},
        {"batch": 0},
        {"batch": 101},
        {"delta": 0.0},
        {"delta": 0.01},
    ],
)
def test_bad_plans_are_refused(change) -> None:
    settings = {"records": 100, "batch": 10, "steps": 5, "epsilon": 1.0, "noise_multiplier": None} | change
    with pytest.raises(ConfigError):
        budget_table(**settings)
