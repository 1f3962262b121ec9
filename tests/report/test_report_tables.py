"""Tables of the report: figures of any kind, accuracy by class, the ledger, neighbours."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.evaluation import evaluate_images
from dpsyngen.evaluation.memorisation import image_data, memorisation_check, neighbour_pairs
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.report.html import FigureRow, class_accuracy, curves, figure_table, ledger_rows, metric_rows


def test_no_empty_columns() -> None:
    table = figure_table([FigureRow("CAS", "90 %", "88 to 92 %"), FigureRow("FID", "3")])
    assert table == {
        "columns": ["figure", "value", "95 % interval"],
        "rows": [["CAS", "90 %", "88 to 92 %"], ["FID", "3", ""]],
    }
    assert figure_table([{"kind": "dp", "rate": ""}]) == {"columns": ["kind"], "rows": [["dp"]]}
    assert figure_table([]) == {"columns": [], "rows": []}


def test_accuracy_by_class() -> None:
    cas = {
        "logreg": {"per_class_accuracy": [0.5, None]},
        "cnn": {"per_class_accuracy": [1.0, 0.25], "confusion": [[9, 1], [6, 2]]},
    }
    found = class_accuracy({"cas": cas, "cas_chosen": "cnn"}, ["a", "b"])
    assert found["classifiers"] == ["logreg", "cnn"]
    assert found["rows"] == [("a", (50.0, 100.0)), ("b", (None, 25.0))]
    assert found["confusion"] == ("cnn", [("a", [9, 1]), ("b", [6, 2])])
    assert class_accuracy({"cas": cas, "cas_chosen": "logreg"}, ["a", "b"])["confusion"] is None
    assert class_accuracy({"cas": {}}, []) is None
    assert class_accuracy({}, []) is None


def test_every_entry_of_the_ledger_has_a_row() -> None:
    charged = SimpleNamespace(kind="dp", reason="steps", mechanism=Mechanism(0.25, 1.5, 900))
    public = SimpleNamespace(kind="public", reason="choice", mechanism=None)
    assert ledger_rows([public, charged]) == [
        {"entry": "1", "kind": "public", "reason": "choice", "runs": "", "rate": "", "noise": ""},
        {"entry": "2", "kind": "dp", "reason": "steps", "runs": "900", "rate": "0.25", "noise": "1.5"},
    ]


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
    assert [pair["number"] for pair in found["groups"][0]["pairs"]] == result.most_suspicious(5).tolist()
    for group in found["groups"]:
        for pair in group["pairs"]:
            i = pair["number"]
            assert pair["generated"] == image_data(generated[i])
            real = (generated[i].astype(float) - private.astype(float)) / 255
            distances = np.sqrt((real**2).mean((1, 2, 3)))
            assert pair["to_private"] == pytest.approx(distances.min(), abs=1e-5)
            assert pair["private"] == image_data(private[distances.argmin()])
            assert (pair["held_out"] is not None) == (pair["to_held_out"] is not None) == held_out


@pytest.fixture(scope="module")
def figures() -> dict:
    train, test = load_images("digits"), load_images("digits:test")
    return evaluate_images(
        train.images[:100],
        train.labels[:100],
        reference=train,
        test=test,
        programs=255 - train.images[:30],
        classifiers=("logreg",),
    )


def test_a_row_for_each_figure(figures) -> None:
    rows = {row.name: row for row in metric_rows(figures)}
    assert len(rows) == 1 + 7
    frechet, m = rows["Fréchet distance, pixels-pca"], figures["features"]["pixels-pca"]["metrics"]["frechet"]
    assert frechet.value == f"{m['value']:.4g}"
    assert frechet.interval == f"{m['low']:.4g} to {m['high']:.4g}"
    assert (frechet.floor, frechet.ceiling) == (f"{m['floor']:.4g}", f"{m['ceiling']:.4g}")
    assert "lower is better; 100 generated against" in frechet.note
    assert "ceiling of 30" in frechet.note  # fewer than were generated: not the same figure
    assert "floor of" not in frechet.note
    assert "fewer different images than dimensions" in frechet.note  # 30 images in 64 dimensions
    assert "TOO FEW" not in rows["precision, pixels-pca"].note
    assert "higher is better" in rows["coverage, pixels-pca"].note
    assert rows["CAS, logreg (chosen by validation)"].value.endswith("%")
    table = figure_table(metric_rows(figures))
    assert {"figure", "value", "95 % interval", "floor", "ceiling", "how to read it"} == set(table["columns"])


def test_what_was_not_measured_is_left_empty(figures) -> None:
    train = load_images("digits")
    bare = evaluate_images(train.images[:100], None, reference=train, test=None, metrics=("kid",), bootstrap=0)
    (row,) = metric_rows(bare)
    assert (row.interval, row.floor, row.ceiling) == ("", "", "")
