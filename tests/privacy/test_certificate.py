"""The certificate: its schema is published, its words follow from its numbers, bounds are never rounded down."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpsyngen
from dpsyngen.errors import ReleaseError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.certificate import UTILITY, Certificate, number, plain_words, safe_markdown, schema_text, strength
from dpsyngen.privacy.ledger import Ledger
from tests.conftest import TINY_SETTINGS, tiny_arrays

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Two images a person, a budget shared with an earlier run that has reserved a part of it."""
    folder = tmp_path_factory.mktemp("c")
    budget = folder / "budget.jsonl"
    Budget.create(budget, epsilon_limit=9.0, delta=1e-3, group_size=2)
    # With every image in each step the noise for a group of 2 is known at once.
    private = {**TINY_SETTINGS["private"], "batch": 60, "steps": 2}
    privacy = {"group_size": 2, "budget": str(budget), "delta": 1e-3}
    settings = {**TINY_SETTINGS, "private": private, "privacy": privacy}
    images = dpsyngen.load_images(tiny_arrays()).fingerprint()
    Budget(budget).reserve("an earlier run", "first", (Mechanism(1.0, 20.0, 1),), images)

    def later(step: object) -> None:
        """A run that begins while this one trains."""
        Budget(budget).reserve("a later run", "third", (Mechanism(1.0, 21.0, 1),), images)

    return dpsyngen.train(tiny_arrays(), epsilon=2.0, out=folder / "second", settings=settings, on_progress=later)


@pytest.fixture(scope="module")
def certificate(run) -> Certificate:
    return Certificate.from_json((run.release / "privacy.json").read_text(), "privacy.json")


def test_schema_in_docs_is_that_of_the_code() -> None:
    assert (DOCS / "certificate.schema.json").read_text() == schema_text(), (
        "write it again: python -c 'from dpsyngen.privacy import certificate as c; print(c.schema_text(), end=\"\")'"
    )
    schema = json.loads(schema_text())
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Certificate.model_fields)


def test_certificate_states_what_the_ledger_and_the_budget_have(run, certificate) -> None:
    ledger = Ledger(run.ledger_path)
    assert certificate.epsilon == ledger.epsilon() == pytest.approx(certificate.recompute("pld"), rel=1e-9)
    assert certificate.epsilon_by_rdp == ledger.epsilon(accountant="rdp") == certificate.recompute("rdp")
    assert 1.9 < certificate.epsilon <= 2.0
    assert certificate.group_size == ledger.group_size == 2
    assert certificate.unit == "up to 2 images together"
    assert ledger.head.digest == certificate.ledger.digest
    assert certificate.budget is not None
    assert run.config.privacy.budget is not None
    budget = Budget(Path(run.config.privacy.budget))
    assert certificate.budget.reserved_epsilon == budget.epsilon() > certificate.epsilon
    assert (certificate.budget.epsilon, certificate.budget.runs) == (9.0, 3)
    # The holder's path of the budget stays in the private half.
    assert "budget" not in (run.release / "config.yaml").read_text()


def test_it_says_that_utility_was_not_checked(run, certificate) -> None:
    assert certificate.utility_checked is False
    for name in ("privacy.json", "PRIVACY.md"):
        assert UTILITY in (run.release / name).read_text()


def test_words_follow_from_the_numbers(run, certificate) -> None:
    page = (run.release / "PRIVACY.md").read_text()
    assert page == plain_words(certificate)
    assert number(certificate.epsilon, up=True) in page
    assert "up to 2 images of one person together" in page
    assert "Nobody has more than 2 of the images" in page
    assert "share one budget" in page
    assert "When this one was released, 3 runs had begun, this one among them" in page
    assert "60 private images" in page
    # Somebody who knows no differential privacy reads the first half: no jargon before the accounting.
    plain = page[: page.index("## How the number comes about")]
    for jargon in (
        "Gaussian",
        "sampling rate",
        "clipp",
        "DP-SGD",
        "Rényi",
        "sensitivity",
        "PLD",
        "subsampl",
        "adjacen",
    ):
        assert jargon not in plain


def test_read_back(certificate) -> None:
    assert Certificate.from_json(certificate.to_json(), "x") == certificate


def test_no_bound_is_a_word_in_the_file_and_a_number_in_python(certificate) -> None:
    told = {"private": False, "not_private_because": ["x"], "epsilon": "inf", "epsilon_by_rdp": "inf"}
    open_one = Certificate.from_json(json.dumps(certificate.to_dict() | told), "x")
    assert open_one.epsilon == open_one.epsilon_by_rdp == math.inf
    assert open_one.to_dict() == certificate.to_dict() | told
    for text in ("Infinity", "1e999", "NaN", "true", '"Infinity"'):
        with pytest.raises(ReleaseError, match="no privacy certificate"):
            Certificate.from_json(open_one.to_json().replace('"epsilon": "inf"', f'"epsilon": {text}'), "x")


@pytest.mark.parametrize(
    "change",
    [
        {"private": False},
        {"not_private_because": ["x"]},
        {"epsilon": "inf"},
        {"epsilon": -1},
        {"epsilon": "1"},
        {"epsilon": None},
        {"delta": 0},
        {"delta": 1},
        {"group_size": 0},
        {"group_size": 1.5},
        {"format": 1},
        {"utility_checked": True},
        {"stages": []},
        {"ledger": {"lines": 1, "digest": "xyz"}},
        {"mechanisms": [{"mechanism": "m", "reason": "r", "kind": "dp"}]},
        {"surprise": 1},
    ],
)
def test_certificates_that_contradict_themselves_or_the_schema(change, certificate) -> None:
    values = {**certificate.to_dict(), **change}
    with pytest.raises(ReleaseError, match="no privacy certificate"):
        Certificate.from_json(json.dumps(values), "x")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"epsilon": NaN}'])
def test_no_certificate_at_all(text) -> None:
    with pytest.raises(ReleaseError, match="no privacy certificate"):
        Certificate.from_json(text, "x")


@given(st.floats(1e-12, 1e12), st.integers(1, 8))
def test_bounds_are_rounded_up_and_only_a_little(value: float, digits: int) -> None:
    shown = Decimal(number(value, digits, up=True).replace(",", ""))
    exact = Decimal(str(value))
    assert exact <= shown <= exact * (1 + Decimal(10) ** (1 - digits))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e-5, "1e-5"), (0.01, "0.01"), (2.0, "2"), (1234567.0, "1,235,000"), (3e9, "3e9")]
)
def test_numbers_for_people(value, text) -> None:
    assert number(value) == text


def test_best_guess_is_the_trade_off_of_differential_privacy() -> None:
    """ε = 1, δ = 0: the corner of the region of errors is at 1/(1 + e)."""
    assert 73.1 < 100 * math.e / (1 + math.e) < 73.15
    assert "at most 73.2 %" in strength(1.0, 0.0)  # rounded up, as a bound must be
    assert "50.0 %" in strength(0.0, 0.0)
    assert "guesses right practically every time" in strength(800.0, 1e-5)
    grades = [re.findall(r"This is ([a-z ]+)", strength(e, 1e-5))[0] for e in (0.5, 2, 8, 20)]
    assert len(set(grades)) == 4


def test_names_of_classes_cannot_write_markup(certificate) -> None:
    hostile = ["<script>alert(1)</script>", "[x](http://evil.example)", "a\n# Privacy certificate", "b\x1b[2J", "|x|"]
    assumed = certificate.public_assumptions.model_copy(update={"class_names": hostile})
    page = plain_words(certificate.model_copy(update={"public_assumptions": assumed}))
    assert "<script>" not in page.replace("\\<", "")
    assert "](" not in page.replace("\\]", "")
    assert page.count("\n# ") == 0
    assert "\x1b" not in page
    assert safe_markdown("~~gone~~\n" + "|" * 5000) == "\\~\\~gone\\~\\~ " + "\\|" * 3991  # cut, but in no escape
