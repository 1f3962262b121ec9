from __future__ import annotations

import json

import pytest

from dpsyngen.console import Console
from dpsyngen.experiments.measures import View, answers
from dpsyngen.experiments.statistics import column_decimals, decimals_for, number, p_text, summarise
from dpsyngen.experiments.tables import all_tables, markdown, print_tables, write_results
from tests.experiments.synthetic import make_experiment


def view_of(path, **options) -> View:
    return View(make_experiment(path / "exp", **options))


def tables_of(view) -> dict:
    return {t.key: t for t in all_tables(view)}


def cells(table, *heads) -> dict:
    (row,) = (r for r in table.rows if r.heads == heads)
    keys = [(group, column) for group, columns in table.groups for column in columns]
    return dict(zip(keys, row.cells, strict=True))


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> View:
    return view_of(tmp_path_factory.mktemp("v"), grid={"epsilon": [1, 10]}, spread=0.3)


@pytest.mark.parametrize(
    ("spread", "decimals"), [(0.0123, 3), (0.036, 2), (0.355, 1), (0.354, 2), (1.0, 1), (9.4, 0), (9.6, 0), (123.0, -1)]
)
def test_digits_follow_the_spread(spread, decimals) -> None:
    assert decimals_for(spread) == decimals


def test_numbers() -> None:
    assert number(-0.04, 1) == "0.0"
    assert number(-1.25, 1, sign=True) == "−1.2"
    assert number(12345.6, -2) == "12,300"
    assert [p_text(p) for p in (0.0, 0.0004, 0.0312, 0.999)] == ["< 0.001", "< 0.001", "0.031", "1"]


def test_a_column_has_the_digits_of_its_median_spread() -> None:
    groups = [summarise(v) for v in ([10.0, 10.2], [20.0, 24.0], [30.0, 34.4])]
    assert column_decimals(groups) == 1
    # One seed: the interval of the run's own images decides, and without it three digits are shown.
    assert column_decimals([summarise([63.4321])], [0.9]) == 1
    assert column_decimals([summarise([63.4321])]) == 1


def test_best_is_bold_and_the_undecided_are_marked(view) -> None:
    table = tables_of(view)["accuracy"]
    assert table.groups == (
        ("ε = 1", ("CNN", "MLP", "logistic regression")),
        ("ε = 10", ("CNN", "MLP", "logistic regression")),
    )
    assert [r.heads[0] for r in table.rows][:5] == ["DPDM", "FineTune", "Cleaning", "Coarse", "Both"]
    assert {c.mark for c in cells(table, "Both").values()} == {"best"}
    # 8 points at a spread of 0.3 are seen with three seeds.
    assert {c.mark for c in cells(table, "DPDM").values()} == {""}


def test_a_tie_is_marked(tmp_path) -> None:
    noisy = view_of(tmp_path, grid={"epsilon": [1]}, spread=20.0)
    marks = [c.mark for row in tables_of(noisy)["accuracy"].rows if not row.reference for c in row.cells]
    assert marks.count("best") == 3
    assert marks.count("tied") == 12
    assert "does not mean that they are equal" in " ".join(tables_of(noisy)["accuracy"].notes)


def test_cell_is_mean_and_standard_deviation(view) -> None:
    measure = view.primary
    row = next(r for r in view.rows if r.variant == "coarse")
    s = summarise(view.values(measure, 1.0, row))
    assert s.n == 3
    text = cells(tables_of(view)["accuracy"], "Coarse")["ε = 1", "CNN"].text
    mean, sd = text.split(" ± ")
    assert float(mean) == pytest.approx(s.mean, abs=0.051)
    assert float(sd) == pytest.approx(s.sd, abs=0.051)
    assert 40 < s.mean < 100  # percent


def test_references_stand_below(view) -> None:
    tables = tables_of(view)
    names = [r.heads[0] for r in tables["accuracy"].rows if r.reference]
    assert names == ["trained on real images", "DP-SGD classifier, same ε"]
    dp = cells(tables["accuracy"], "DP-SGD classifier, same ε")
    assert dp["ε = 1", "CNN"].text != dp["ε = 10", "CNN"].text
    assert dp["ε = 1", "MLP"].text == dp["ε = 1", "CNN"].text  # it is of no kind: every accuracy is read by it
    distances = tables["pixels-pca-lower"]
    assert [r.heads[0] for r in distances.rows if r.reference] == [
        "real test images (floor)",
        "images of programs (ceiling)",
    ]
    assert cells(distances, "images of programs (ceiling)")["ε = 1", "Fréchet distance"].text.startswith("120")
    assert not any(c.mark for table in tables.values() for r in table.rows if r.reference for c in r.cells)


def test_answers_state_difference_interval_and_seeds(view) -> None:
    one, ten = answers(view)
    assert (one.epsilon, ten.epsilon) == (1.0, 10.0)
    assert "Both" in one.headline
    assert "with 3 seeds all others are shown to be worse" in one.headline
    both = one.lines[-1]
    assert both.startswith("Both is better than DPDM by ")
    assert "points (95 % CI " in both
    assert len(one.lines) == 4


def test_lower_is_better_for_distances(tmp_path) -> None:
    view = view_of(tmp_path, grid={"epsilon": [1], "variant": ["dpdm", "both"]}, classes=0, spread=0.3)
    assert view.primary.name == "Fréchet distance on EfficientNet-Lite0"
    (answer,) = answers(view)
    assert answer.lines[0].startswith("Both is better than DPDM by ")
    verdict = tables_of(view)["verdicts"].rows[0]
    assert verdict.cells[1].text.startswith("−")
    assert verdict.cells[-1].text == "better"
    assert "accuracy" not in tables_of(view)
    assert "classes" not in tables_of(view)


def test_one_seed_says_so(tmp_path) -> None:
    view = view_of(tmp_path, grid={"epsilon": [1], "seeds": 1})
    (answer,) = answers(view)
    assert "one seed each cannot show a difference" in answer.headline
    assert all("one seed each cannot show a difference" in line for line in answer.lines)
    tables = tables_of(view)
    assert "One seed each" in tables["accuracy"].notes[0]
    assert {r.cells[-1].text for r in tables["verdicts"].rows} == {"not tested"}
    assert not any(c.mark == "tied" for t in tables.values() for r in t.rows for c in r.cells)
    assert "±" not in cells(tables["accuracy"], "Both")["ε = 1", "CNN"].text


def test_a_row_with_one_seed_beside_others_is_not_shown_to_be_worse(tmp_path) -> None:
    def change(job, result):
        return None if job.variant == "coarse" and job.seed else result

    view = view_of(tmp_path, grid={"epsilon": [1]}, change=change)
    marks = {row.heads[0]: row.cells[0].mark for row in tables_of(view)["accuracy"].rows if not row.reference}
    assert (marks["Both"], marks["Coarse"], marks["Cleaning"]) == ("best", "tied", "")


def test_a_missing_seed_is_counted(tmp_path) -> None:
    view = view_of(tmp_path, grid={"epsilon": [1]}, change=lambda job, r: None if job.name == "both-eps1-seed2" else r)
    assert cells(tables_of(view)["accuracy"], "Both")["ε = 1", "CNN"].n == 2
    assert cells(tables_of(view)["accuracy"], "DPDM")["ε = 1", "CNN"].n is None
    assert "(n = 2)" in markdown(view)


def test_a_missing_variant_at_one_epsilon(tmp_path) -> None:
    def change(job, result):
        return None if job.variant == "both" and job.epsilon == 10 else result

    view = view_of(tmp_path, grid={"epsilon": [1, 10]}, change=change)
    found = cells(tables_of(view)["accuracy"], "Both")
    assert found["ε = 10", "CNN"].text == "–"
    assert found["ε = 1", "CNN"].text != "–"
    assert len(answers(view)[1].lines) == 3


def test_settings_find_their_baseline(tmp_path) -> None:
    axes = {"stages.tau_coarse": [1, 2], "private.steps": [100, 200]}
    view = view_of(tmp_path, grid={"epsilon": [1], "variant": ["dpdm", "coarse"], "axes": axes, "seeds": 2})
    found = view.baselines(view.primary, 1.0)
    assert found == {f"Coarse (tau_coarse={t}, steps={s})": f"DPDM (steps={s})" for t in (1, 2) for s in (100, 200)}
    table = tables_of(view)["accuracy"]
    assert table.heads == ("variant", "settings")
    assert cells(table, "Coarse", "tau_coarse=1, steps=200")
    assert len(tables_of(view)["verdicts"].rows) == 4 * len(view.measures)


def test_unequal_terms_are_named(tmp_path) -> None:
    def change(job, result):
        if job.variant == "both":
            result["facts"]["steps"] = 900
        return result

    view = view_of(tmp_path, grid={"epsilon": [1], "variant": ["dpdm", "coarse", "both"]}, change=change)
    assert view.unequal() == [
        "ε = 1: steps 450 (DPDM, Coarse); 900 (Both)",
    ]


def test_unequal_terms_that_are_the_same_at_each_epsilon_are_said_once(tmp_path) -> None:
    def change(job, result):
        if job.variant == "both":
            result["facts"]["steps"] = 900
        return result

    view = view_of(tmp_path, grid={"epsilon": [1, 10], "variant": ["dpdm", "both"]}, change=change)
    assert view.unequal() == ["ε = 1, ε = 10: steps 450 (DPDM); 900 (Both)"]


def test_equal_terms_are_not_named(view) -> None:
    assert view.unequal() == []


def test_classes_are_rows_with_their_worst(tmp_path) -> None:
    view = view_of(tmp_path, grid={"epsilon": [1], "seeds": 1}, classes=4)
    table = tables_of(view)["classes"]
    assert [r.heads[0] for r in table.rows] == ["0", "1", "2", "3", "worst class of each run"]
    columns = list(zip(*(r.cells for r in table.rows), strict=True))
    for *of_class, worst in columns:
        assert min(float(c.text) for c in of_class) == float(worst.text)


def test_very_many_classes_are_cut(tmp_path) -> None:
    view = view_of(tmp_path, grid={"epsilon": [1], "variant": ["dpdm"], "seeds": 1}, classes=150)
    table = tables_of(view)["classes"]
    assert len(table.rows) == 61
    assert "60 hardest of 149" in " ".join(table.notes)


def test_markdown_cannot_be_broken_by_names(tmp_path) -> None:
    def change(job, result):
        result["evaluation"]["class_names"] = ["a|b ~~x~~", "<script>", "*\n# c"]
        return result

    view = view_of(tmp_path, grid={"epsilon": [1], "variant": ["dpdm", "both"]}, classes=3, change=change)
    text = markdown(view)
    assert "| a\\|b \\~\\~x\\~\\~ |" in text
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\n# c" not in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            bars = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(bars) == 1


def test_markdown_says_private_first(view) -> None:
    assert markdown(view).startswith("**PRIVATE")


def test_print_tables(tmp_path, capsys) -> None:
    exp = make_experiment(tmp_path / "e", grid={"epsilon": [1], "variant": ["dpdm", "both"]})
    (exp / "results" / "both-eps1-seed1.json").write_text("{")
    print_tables(exp, Console())
    out = capsys.readouterr().out
    assert out.startswith("ε = 1: the best mean CNN accuracy")
    assert "\x1b" not in out
    assert "- both-eps1-seed1.json: " in out
    assert "PRIVATE" in out.splitlines()[-1]
    assert "Fréchet" in out


def test_nothing_finished(tmp_path, capsys) -> None:
    exp = make_experiment(tmp_path / "e", grid={"epsilon": [1]}, change=lambda job, result: None)
    assert View(exp).jobs == ()
    assert write_results(exp)[-1].read_text().startswith("**PRIVATE")
    print_tables(exp, Console())
    assert "PRIVATE" in capsys.readouterr().out


def test_only_references_finished(tmp_path) -> None:
    exp = make_experiment(
        tmp_path / "e", grid={"epsilon": [1]}, change=lambda job, result: None if job.kind == "run" else result
    )
    view = View(exp)
    assert all_tables(view) == []
    assert answers(view) == []


def test_a_job_without_evaluation_has_facts_alone(tmp_path) -> None:
    exp = make_experiment(tmp_path / "e", grid={"epsilon": [1], "variant": ["dpdm"], "seeds": 1})
    path = exp / "results" / "dpdm-eps1-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation": None}))
    assert {r["metric"] for r in View(exp).tidy() if r["kind"] == "run"} >= {"steps", "seconds_training"}
