from __future__ import annotations

import csv
import json
import math
import stat
from pathlib import Path

import pytest

from dpsyngen.errors import RunError
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.measures import FIXED, View
from dpsyngen.experiments.tables import write_results
from tests.experiments.synthetic import make_experiment

GRID = {"variant": ["both", "dpdm"], "epsilon": ["inf", 1], "seeds": 2, "axes": {"stages.tau_coarse": [1, 2]}}


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    return make_experiment(tmp_path / "exp", grid=GRID, classes=3)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_jobs_in_order(exp) -> None:
    results = View(exp)
    runs = [(j.variant, j.epsilon, j.label, j.seed) for j in results.runs]
    assert len(runs) == 2 * 2 * (1 + 2)
    assert runs[:4] == [("dpdm", 1, "", 0), ("dpdm", 1, "", 1), ("dpdm", math.inf, "", 0), ("dpdm", math.inf, "", 1)]
    assert [r[2] for r in runs[4:8]] == ["tau_coarse=1"] * 2 + ["tau_coarse=2"] * 2
    assert {j.kind for j in results.jobs[len(runs) :]} == {"real", "dp-classifier"}
    assert results.axes == ("stages.tau_coarse",)
    assert results.skipped == ()


def test_long_table_has_a_row_for_each_figure(exp) -> None:
    results = View(exp)
    rows = results.tidy()
    keys = [(r["job"], r["metric"], r["on"], r["class"]) for r in rows]
    assert len(set(keys)) == len(keys)
    one = json.loads((exp / "results" / "both-eps1-tau_coarse=2-seed1.json").read_text())
    mine = {(r["metric"], r["on"], r["class"]): r for r in rows if r["job"] == one["job"]}
    accuracy = mine["accuracy", "cnn", ""]
    assert accuracy["value"] == one["evaluation"]["cas"]["cnn"]["accuracy"]
    assert (accuracy["low"], accuracy["unit"], accuracy["images"]) == (accuracy["value"] - 0.009, "share", 10000)
    assert mine["accuracy", "cnn", "2"]["value"] == one["evaluation"]["cas"]["cnn"]["per_class_accuracy"][2]
    frechet = mine["frechet", "pixels-pca", ""]
    theirs = one["evaluation"]["features"]["pixels-pca"]["metrics"]["frechet"]
    assert {k: frechet[k] for k in theirs} == theirs
    facts = one["facts"]
    assert mine["seconds_training", "", ""]["value"] == facts["seconds_public"] + facts["seconds_private"]
    assert {r["stages.tau_coarse"] for r in rows if r["variant"] == "dpdm"} == {None}
    assert accuracy["stages.tau_coarse"] == 2


def test_csv_has_the_long_table(exp) -> None:
    paths = write_results(exp)
    assert [p.name for p in paths] == ["results.csv", "tables.md"]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in paths)
    with open(paths[0], encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    table = View(exp).tidy()
    assert list(lines[0]) == list(table[0]) == [*FIXED[:8], "stages.tau_coarse", *FIXED[8:]]
    for line, row in zip(lines, table, strict=True):
        assert line["job"] == row["job"]
        assert float(line["value"]) == row["value"]
        assert float(line["epsilon"]) == row["epsilon"]
        assert line["stages.tau_coarse"] == ("" if (t := row["stages.tau_coarse"]) is None else f"{t:g}")


def test_the_same_bytes_each_time(exp) -> None:
    before = [p.read_bytes() for p in write_results(exp)]
    assert [p.read_bytes() for p in write_results(exp)] == before


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"job": "other"}, "about the job"),
        ({"measured": "in another way"}, "another way"),
        ({"evaluation": {"cas": {"cnn": {}}}}, "accuracy"),
        ({"evaluation": {"cas": {"cnn": {"accuracy": math.nan}}}}, "finite number"),
        ({"evaluation": {"features": {"pixels": {"metrics": {"kid": {"value": 1, "better": "x"}}}}}}, "better"),
        ({"facts": [1]}, "facts"),
        ({"private": "perhaps"}, "private"),
        ({"delta": "small"}, "delta"),
    ],
)
def test_damaged_files_are_named_and_left_out(exp, changes, why) -> None:
    path = exp / "results" / "dpdm-eps1-seed0.json"
    rewrite(path, **changes)
    results = View(exp)
    ((name, reason),) = results.skipped
    assert name == path.name
    assert why in reason
    assert "dpdm-eps1-seed0" not in {j.name for j in results.jobs}
    assert "dpdm-eps1-seed0" in (write_results(exp)[-1]).read_text().replace("\\", "")


def test_what_the_specification_says_is_not_taken_from_a_file(exp) -> None:
    before = View(exp).jobs
    said = {"name": "x", "kind": "walk", "variant": "none", "epsilon": "many", "seed": 7, "settings": 3, "label": "x"}
    rewrite(exp / "results" / "dpdm-eps1-seed0.json", **said, config=1, release="/etc")
    assert View(exp).jobs == before


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000, "\x00\xff", '{"job": "dpdm-eps1-seed0"}'])
def test_any_text_is_survived(exp, text) -> None:
    (exp / "results" / "dpdm-eps1-seed0.json").write_text(text)
    assert Experiment(exp).statuses()["dpdm-eps1-seed0"].state == "waiting"
    assert [name for name, _ in View(exp).skipped] == ["dpdm-eps1-seed0.json"]


def test_a_job_that_the_specification_lacks_is_left_out(exp) -> None:
    path = exp / "results" / "dpdm-eps1-seed0.json"
    (exp / "results" / "dpdm-eps1-seed7.json").write_text(path.read_text().replace("seed0", "seed7"))
    assert View(exp).skipped == (("dpdm-eps1-seed7.json", "it belongs to no job of the specification"),)


def test_the_baseline_is_that_of_the_specification(tmp_path) -> None:
    exp = make_experiment(tmp_path / "e", grid={"epsilon": [1], "seeds": 1}, baseline="finetune", classes=2)
    assert View(exp).experiment.spec.baseline == "finetune"


def test_no_experiment(tmp_path) -> None:
    with pytest.raises(RunError, match="not the folder of an experiment"):
        View(tmp_path)
    (tmp_path / "experiment.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="not the folder of an experiment"):
        View(tmp_path)
