"""The family-wise error."""

from __future__ import annotations

import pytest

from dpsyngen.audit.report import Finding, by_p_value, decide


def test_error_is_shared_among_the_tests_and_exact_findings_have_none() -> None:
    found = decide(
        [
            by_p_value("a", "", "", 0.004),
            by_p_value("b", "", "", 0.006),
            Finding("c", True, "", ""),
            Finding("d", False, "", ""),
        ],
        0.01,
    )
    assert [f.passed for f in found] == [False, True, True, False]
    assert [f.level for f in found] == [0.005, 0.005, 0.0, 0.0]
    assert found[2].p_value is None
    with pytest.raises(ValueError, match="error"):
        decide(found, 0.0)
