"""Tables of the report: figures of any kind, accuracy by class, the ledger, neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from dpsyngen.evaluation.memorisation import memorisation_check
from dpsyngen.evaluation.pairs import chosen_images, image_data, neighbour_pairs
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.report.class_accuracy import class_accuracy
from dpsyngen.report.curves import curves
from dpsyngen.report.figure_table import figure_table
from dpsyngen.report.ledger_rows import ledger_rows


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    floor: str = ""
    interval: str | None = None


class Named(NamedTuple):
    name: str
    value: str
    floor: str = ""
    interval: str | None = None


@pytest.mark.parametrize("kind", [Row, Named, lambda *a: Row(*a).__dict__])
def test_rows_of_any_kind_and_no_empty_columns(kind) -> None:
    table = figure_table([kind("CAS", "90 %", "", "88 to 92 %"), kind("FID", "3", "")])
    assert table == {
        "columns": ["figure", "value", "95 % interval"],
        "rows": [["CAS", "90 %", "88 to 92 %"], ["FID", "3", ""]],
    }


def test_plain_rows() -> None:
    table = figure_table([("CAS", "90 %", "of 100")])
    assert table == {"columns": ["figure", "value", "how to read it"], "rows": [["CAS", "90 %", "of 100"]]}
    assert figure_table([]) == {"columns": [], "rows": []}


def test_accuracy_by_class() -> None:
    cas = {
        "logreg": {"per_class_accuracy": [0.5, None]},
        "cnn": {"per_class_accuracy": [1.0, 0.25], "confusion": [[9, 1], [6, 2]]},
    }
    found = class_accuracy({"cas": cas, "cas_chosen": "cnn"}, ["a", "b"])
    assert found["classifiers"] == ["logreg", "cnn"]
    assert [[cell["text"] for cell in row["cells"]] for row in found["rows"]] == [
        ["50.0 %", "100.0 %"],
        ["no test image", "25.0 %"],
    ]
    assert found["confusion"]["classifier"] == "cnn"
    assert [[(c["count"], c["right"], c["many"]) for c in row["cells"]] for row in found["confusion"]["rows"]] == [
        [(9, True, False), (1, False, False)],
        [(6, False, True), (2, True, False)],
    ]
    assert class_accuracy({"cas": cas, "cas_chosen": "logreg"}, ["a", "b"])["confusion"] is None
    assert class_accuracy({"cas": {}}, []) is None
    assert class_accuracy({}, []) is None


def entry(kind: str, reason: str, mechanism: Mechanism | None = None, **details: object) -> SimpleNamespace:
    return SimpleNamespace(kind=kind, reason=reason, mechanism=mechanism, details=details)


def test_entries_that_repeat_share_a_row_and_no_run_is_lost() -> None:
    rows = ledger_rows(
        [
            entry("public", "choice", program={"name": "noise", "weights": None}, tiers=[1, 2]),
            entry("dp", "steps", Mechanism(0.25, 1.5, 900), first_step=0, batch=4.0),
            entry("dp", "steps", Mechanism(0.25, 1.5, 600), first_step=900, batch=4.0),
            entry("dp", "steps", Mechanism(0.25, 2.0, 7), first_step=1500, batch=4.0),
            entry("dp", "steps", Mechanism(0.25, 1.5, 5), first_step=1507, batch=4.0),
        ]
    )
    assert [(r["entry"], r["runs"], r["noise"]) for r in rows] == [
        ("1", "", ""),
        ("2–3", "1,500", "1.5"),
        ("4", "7", "2"),
        ("5", "5", "1.5"),
    ]
    assert rows[0]["details"] == "program (name noise); tiers 1, 2"
    assert rows[1]["details"] == "batch 4"
    assert rows[2]["details"] == "first step 1500; batch 4"


def test_curves_leave_out_what_is_not_finite() -> None:
    log = [
        {"phase": "b", "step": 2, "loss": 0.5},
        {"phase": "b", "step": 1, "loss": 1},
        {"phase": "b", "step": 3, "loss": float("nan")},
        {"phase": "a", "step": 1},
    ]
    assert curves(log, "loss") == {"b": [(1, 1.0), (2, 0.5)]}


@pytest.mark.parametrize("held_out", [True, False])
def test_pairs_show_each_image_with_its_own_neighbours_and_distances(held_out) -> None:
    rng = np.random.default_rng(0)
    private, control = (rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8) for _ in range(2))
    generated = np.concatenate([private[[7]], rng.integers(0, 256, (11, 3, 8, 8), dtype=np.uint8)])
    control_or_none = control if held_out else None
    result = memorisation_check(generated, private, control_or_none)
    found = neighbour_pairs(result, generated, private, control_or_none, count=5, seed=3)
    assert "root mean square" in found["unit"]
    assert [len(group["pairs"]) for group in found["groups"]] == [5, 5]
    first = found["groups"][0]["pairs"][0]  # the copy is the most suspicious
    assert (first["number"], first["to_private"]) == (0, 0.0)
    assert first["generated"] == first["private"] == image_data(private[7])
    for (_, picks), group in zip(chosen_images(result, 5, 3), found["groups"], strict=True):
        assert [pair["number"] for pair in group["pairs"]] == picks.tolist()
        for pair in group["pairs"]:
            i = pair["number"]
            assert pair["generated"] == image_data(generated[i])
            real = (generated[i].astype(float) - private.astype(float)) / 255
            distances = np.sqrt((real**2).mean((1, 2, 3)))
            assert pair["to_private"] == pytest.approx(distances.min(), abs=1e-5)
            assert pair["private"] == image_data(private[distances.argmin()])
            assert (pair["held_out"] is not None) == (pair["to_held_out"] is not None) == held_out
