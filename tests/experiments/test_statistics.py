from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dpsyngen.experiments.statistics import (
    against_best,
    best_of,
    compare,
    holm,
    summarise,
)

NAMES = ("dpdm", "finetune", "cleaning", "coarse", "both")
SPREADS = {"equal": (1, 1, 1, 1, 1), "unequal": (1, 1, 2, 4, 8), "wide baseline": (8, 1, 1, 1, 1)}
ROUNDS = 500
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / ROUNDS)
"""The nominal level and three standard errors of the simulation."""


def draws(spreads, seed, means=(0, 0, 0, 0, 0), n=3):
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        yield {k: rng.normal(m, s, n).tolist() for k, m, s in zip(NAMES, means, spreads, strict=True)}


def family(groups):
    return compare([(name, "dpdm") for name in NAMES[1:]], groups, "higher")


def test_welch_is_that_of_scipy() -> None:
    a, b = [1.0, 2.5, 3.0], [2.0, 5.0, 9.0, 4.0]
    (mine,) = compare([("a", "b")], {"a": a, "b": b}, "higher")
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert mine.p == pytest.approx(theirs.pvalue)
    assert mine.p_corrected == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert (mine.low, mine.high) == pytest.approx((interval.low, interval.high))
    assert mine.difference == pytest.approx(np.mean(a) - np.mean(b))


def test_summary() -> None:
    s = summarise([4.0, 6.0, 8.0])
    assert (s.n, s.mean, s.sd) == (3, 6.0, 2.0)
    assert summarise([4.0]).sd is None
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.02, 0.5]) == pytest.approx([0.08, 0.04, 0.06, 0.5])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("spreads", SPREADS)
def test_false_alarms_stay_at_the_level(spreads) -> None:
    against, best, uncorrected = 0, 0, 0
    for groups in draws(SPREADS[spreads], seed=len(spreads)):
        found = family(groups)
        against += any(c.verdict in ("better", "worse") for c in found)
        uncorrected += any(c.p <= 0.05 for c in found)
        best += any(c.verdict != "not shown" for c in against_best(groups, "higher"))
    assert against / ROUNDS <= ALLOWED
    assert best / ROUNDS <= ALLOWED
    # The simulation would notice: without the correction there are more alarms.
    assert uncorrected > against


def test_pooled_spreads_would_raise_false_alarms() -> None:
    """Why the test is not Tukey's."""
    limit = stats.studentized_range.isf(0.05, 5, 10)
    alarms = 0
    for groups in draws(SPREADS["wide baseline"], seed=3):
        v = np.array(list(groups.values()))
        error = math.sqrt(v.var(axis=1, ddof=1).mean() / 3)
        alarms += (v.mean(axis=1).max() - v.mean(axis=1).min()) / error > limit
    assert alarms / ROUNDS > 2 * ALLOWED


def test_a_real_difference_is_found() -> None:
    found = right = 0
    for groups in draws(SPREADS["equal"], seed=5, means=(0, 0, 0, 0, 12)):
        verdicts = {c.first: c.verdict for c in family(groups)}
        found += verdicts["both"] == "better"
        right += best_of(groups, "higher") == "both"
    assert found / ROUNDS > 0.9
    assert right == ROUNDS


def test_direction_of_better() -> None:
    groups = {"dpdm": [10.0, 10.1, 9.9], "both": [5.0, 5.1, 4.9]}
    for better, verdict in (("lower", "better"), ("higher", "worse")):
        (c,) = compare([("both", "dpdm")], groups, better)
        assert c.verdict == verdict
        assert c.difference == pytest.approx(-5)
    assert best_of(groups, "lower") == "both"
    assert best_of(groups, "higher") == "dpdm"


def test_one_seed_is_not_tested() -> None:
    (c,) = compare([("both", "dpdm")], {"dpdm": [1.0], "both": [9.0]}, "higher")
    assert (c.verdict, c.p, c.low, c.family) == ("not tested", None, None, 0)
    assert "one seed" in c.reason


def test_values_without_spread_are_not_tested() -> None:
    (c,) = compare([("a", "b")], {"a": [0.1, 0.1, 0.1], "b": [0.3, 0.3, 0.3]}, "higher")
    assert c.verdict == "not tested"
    assert "do not vary" in c.reason


def test_one_seed_beside_three_does_not_count_in_the_family() -> None:
    groups = {"dpdm": [1.0, 1.2, 0.9], "coarse": [3.0], "both": [9.0, 9.1, 8.9]}
    found = compare([("coarse", "dpdm"), ("both", "dpdm")], groups, "higher")
    assert [c.verdict for c in found] == ["not tested", "better"]
    assert found[1].family == 1
    assert found[1].p_corrected == found[1].p


def test_the_best_is_compared_within_all_pairs() -> None:
    groups = {k: [10.0 * i, 10.0 * i + 1, 10.0 * i + 2] for i, k in enumerate(NAMES)}
    found = against_best(groups, "higher")
    assert {(c.first, c.second) for c in found} == {(k, "both") for k in NAMES[:-1]}
    assert {c.family for c in found} == {10}
    assert all(c.verdict == "worse" for c in found)


def test_what_only_the_correction_hides_is_said() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        groups = {k: rng.normal(0, 1, 3).tolist() for k in NAMES}
        for c in family(groups):
            if c.p <= 0.05 < c.p_corrected:
                assert c.reason == "no difference shown with 3 seeds once 4 comparisons are allowed for"
                return
    pytest.fail("no such case among 300 draws")
