"""Rows of figures: each with what it is measured against."""

from __future__ import annotations

import pytest

from dpsyngen.data import load_images
from dpsyngen.evaluation import evaluate_images
from dpsyngen.report.figure_table import figure_table
from dpsyngen.report.tables import metric_rows


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
    assert "TOO FEW IMAGES" in frechet.note  # 30 images in 64 dimensions
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
    # Figures that an earlier version wrote have no such part.
    assert metric_rows({"private": "", "cas": {}, "frechet": {"pixels-pca": {}}}) == []
