"""Exact intervals and the family-wise error."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from dpsyngen.audit.findings import by_p_value, clopper_pearson, decide, exact


def test_clopper_pearson_at_the_ends_and_by_its_definition() -> None:
    assert clopper_pearson(0, 20, 0.05) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert clopper_pearson(20, 20, 0.05) == pytest.approx((0.025 ** (1 / 20), 1.0))
    low, high = clopper_pearson(7, 30, 0.1)
    assert binom.sf(6, 30, low) == pytest.approx(0.05)
    assert binom.cdf(7, 30, high) == pytest.approx(0.05)
    for wrong in ((-1, 3, 0.1), (4, 3, 0.1), (0, 0, 0.1), (1, 3, 0.0)):
        with pytest.raises(ValueError, match="need"):
            clopper_pearson(*wrong)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5])
def test_clopper_pearson_covers(p) -> None:
    """The exact coverage, added up over all outcomes."""
    n, error = 40, 0.1
    k = np.arange(n + 1)
    inside = [clopper_pearson(i, n, error)[0] <= p <= clopper_pearson(i, n, error)[1] for i in k]
    assert binom.pmf(k, n, p)[inside].sum() >= 1 - error


def test_error_is_shared_among_the_tests_and_exact_findings_have_none() -> None:
    found = decide(
        [
            by_p_value("a", "", "", 0.004),
            by_p_value("b", "", "", 0.006),
            exact("c", True, "", ""),
            exact("d", False, "", ""),
        ],
        0.01,
    )
    assert [f.passed for f in found] == [False, True, True, False]
    assert [f.level for f in found] == [0.005, 0.005, 0.0, 0.0]
    assert found[2].p_value is None
    with pytest.raises(ValueError, match="error"):
        decide(found, 0.0)
