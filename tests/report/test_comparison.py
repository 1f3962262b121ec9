from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest

import dpsyngen
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.measures import View
from dpsyngen.report.comparison import sample_grids, write_comparison
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.experiments.synthetic import make_experiment
from tests.report import chromium

pytestmark = pytest.mark.slow

HOSTILE = '<script>alert(1)</script>"&'
TRAINED = ("dpdm", "both")


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> Path:
    """Two tiny runs, by name of the variant."""
    folder = tmp_path_factory.mktemp("generators")
    for variant in TRAINED:
        settings = {**TINY_SETTINGS, "stages": {"variant": variant}}
        dpsyngen.train(tiny_arrays(), epsilon=4.0, out=folder / variant, settings=settings)
    return folder


@pytest.fixture(scope="module")
def made(generators, tmp_path_factory) -> Path:
    """An experiment with two generators, one failed run, one not begun, a damaged file and hostile names."""

    def change(job, result):
        result["evaluation"]["class_names"] = ["zero", HOSTILE, "a" * 60]
        if job.name in ("both-eps4-seed1", "coarse-eps4-seed0"):
            return None
        return result

    exp = make_experiment(
        tmp_path_factory.mktemp("made") / "exp",
        grid={"epsilon": [4], "variant": ["dpdm", "coarse", "both"], "seeds": 2},
        classes=3,
        change=change,
        name=HOSTILE,
        description=HOSTILE,
    )
    for variant in TRAINED:
        shutil.copytree(generators / variant, exp / "runs" / f"{variant}-eps4-seed0")
    (exp / "results" / "dpdm-eps4-seed1.json").write_text("{")
    work = exp / "work" / "both-eps4-seed1"
    work.mkdir()
    experiment = Experiment(exp)
    job = next(j for j in experiment.jobs if j.name == "both-eps4-seed1")
    failure = {"error": f"the loss is not finite {HOSTILE}", "measured": experiment.measure_digest(job)}
    (work / "failed.json").write_text(json.dumps(failure))
    write_comparison(exp)
    return exp


@pytest.fixture(scope="module")
def text(made) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


def visible(text: str) -> str:
    return re.sub(r"<[^>]+>", " ", text.split("<body>")[1])


def test_page_is_private_and_stands_alone(made, text) -> None:
    assert stat.S_IMODE((made / "report.html").stat().st_mode) == 0o600
    assert 'class="banner">PRIVATE.' in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert "alert(1)" in text  # the hostile names are there, as text


def test_page_is_well_formed(text) -> None:
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text):
        assert target in ids
    contents = text.split("</nav>")[0].split("<nav")[1]
    assert re.findall(r'href="#([^"]+)"', contents) == re.findall(r'<h2 id="([^"]+)"', text) != []
    assert not re.search(r"<img(?![^>]*\salt=\"[^\"]+\")", text)
    assert not re.search(r"<svg(?![^>]*\saria-label=\"[^\"]+\")", text)
    assert text.count("<table") == text.count("<caption")


def test_answers_and_what_is_missing(text) -> None:
    shown = visible(text)
    assert "The best mean CNN accuracy is that of" in shown
    assert "one seed each cannot show a difference" in shown
    assert "3 jobs have no figures here" in shown
    assert "failed: the loss is not finite" in shown
    assert re.search(r"coarse-eps4-seed0\s*: not begun", shown)
    assert re.search(r"dpdm-eps4-seed1\s*: left out", shown)


def test_privacy_and_protocol(text) -> None:
    shown = visible(text)
    assert "ε ≤ 9.87" in shown
    assert "Welch" in shown
    assert "Holm" in shown
    assert "Who chose what on what" in shown


def test_same_noise_for_all_variants(made, tmp_path) -> None:
    view = View(made)
    (grid,) = sample_grids(view, made)
    assert [r.name for r in grid.rows] == ["DPDM", "Both"]
    assert grid.classes == ("0", "1", "2")
    dpdm, both = (row.pictures for row in grid.rows)
    assert all(a[0] != b[0] for a, b in zip(dpdm, both, strict=True))
    assert sample_grids(view, made)[0].rows == grid.rows
    # With one generator in both places, only the noise could differ.
    shutil.copytree(made, tmp_path / "exp")
    for name in ("release", "private"):
        shutil.rmtree(tmp_path / "exp" / "runs" / "both-eps4-seed0" / name)
        shutil.copytree(made / "runs" / "dpdm-eps4-seed0" / name, tmp_path / "exp" / "runs" / "both-eps4-seed0" / name)
    (same,) = sample_grids(View(tmp_path / "exp"), tmp_path / "exp")
    first, second = (row.pictures for row in same.rows)
    assert [p[0] for p in first] == [p[0] for p in second] == [p[0] for p in dpdm]


def test_a_generator_outside_the_experiment_is_not_opened(made, tmp_path) -> None:
    exp = tmp_path / "exp"
    shutil.copytree(made, exp)
    release = exp / "runs" / "both-eps4-seed0" / "release"
    shutil.move(release, tmp_path / "elsewhere")
    release.symlink_to(tmp_path / "elsewhere")
    (grid,) = sample_grids(View(exp), exp)
    assert [r.name for r in grid.rows] == ["DPDM"]
    ((name, why),) = ((n, w) for n, w in grid.missing if n == "Both")
    assert name == "Both"
    assert "outside" in why


def test_nothing_finished_still_makes_a_page(tmp_path) -> None:
    exp = make_experiment(tmp_path / "exp", grid={"epsilon": [1]}, change=lambda job, result: None)
    shown = visible(write_comparison(exp).read_text())
    assert "No run has figures yet" in shown
    assert "jobs have no figures here" in shown


def test_reproducible_noise_is_said(tmp_path) -> None:
    def change(job, result):
        return result | {"private": False}

    options = {"grid": {"epsilon": [1], "variant": ["dpdm"], "seeds": 1}, "classes": 2, "features": ()}
    seeded = make_experiment(tmp_path / "a", change=change, **options)
    assert "NOT PRIVATE" in visible(write_comparison(seeded).read_text())
    secret = make_experiment(tmp_path / "b", **options)
    assert "NOT PRIVATE" not in visible(write_comparison(secret).read_text())


@pytest.mark.slow
@chromium.needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(made, width, dark) -> None:
    page = chromium.inspect(made / "report.html", width=width, dark=dark, expression=_CONTRAST)
    assert page.errors == []
    assert page.requests == []
    assert page.broken == []
    assert page.images == 2 * 3
    assert page.overflow == 0
    assert "PRIVATE" in page.text
    assert page.value["text"] == page.value["page"]


# The text of a plot has the colour of the page's text, in either scheme.
_CONTRAST = """
(() => {
  const glyph = document.querySelector("svg.plot [style*='currentColor'], svg.plot [style*='currentcolor']");
  return {text: getComputedStyle(glyph).color, page: getComputedStyle(document.body).color};
})()
"""


def test_a_generator_of_other_classes_is_not_shown_under_the_first_ones_names(made, tmp_path) -> None:
    exp = tmp_path / "exp"
    shutil.copytree(made, exp)
    shutil.rmtree(exp / "runs" / "both-eps4-seed0")
    settings = {**TINY_SETTINGS, "stages": {"variant": "both"}}
    dpsyngen.train(tiny_arrays(classes=2), epsilon=4.0, out=exp / "runs" / "both-eps4-seed0", settings=settings)
    (grid,) = sample_grids(View(exp), exp)
    assert [r.name for r in grid.rows] == ["DPDM"]
    assert grid.classes == ("0", "1", "2")
    assert "other classes" in dict(grid.missing)["Both"]
