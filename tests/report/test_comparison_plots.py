from __future__ import annotations

import re

import pytest

from dpsyngen.experiments.measures import View
from dpsyngen.report.comparison import STYLES, comparison_plots, write_plots
from tests.experiments.synthetic import make_experiment


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> View:
    exp = make_experiment(
        tmp_path_factory.mktemp("p") / "exp", grid={"epsilon": [1, "inf"], "variant": ["dpdm", "both"]}
    )
    return View(exp)


@pytest.fixture(scope="module")
def plots(view):
    return list(comparison_plots(view))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> View:
    """Two plots are enough where files are looked at."""
    folder = tmp_path_factory.mktemp("s") / "exp"
    grid = {"epsilon": [1], "variant": ["dpdm", "both"], "seeds": 2}
    return View(make_experiment(folder, grid=grid, classes=0, features=("pixels-pca",)))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("variant", STYLES)
@pytest.mark.parametrize("ground", ["#ffffff", "#14171c"])
def test_colours_stand_out_from_both_grounds(variant, ground) -> None:
    light, dark = sorted((luminance(STYLES[variant][0]), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.1, 1.4.11


def test_no_variant_is_told_by_colour_alone() -> None:
    assert len({marker for _, marker, _ in STYLES.values()}) == len(STYLES)
    assert len({str(dash) for _, _, dash in STYLES.values()}) == len(STYLES)


@pytest.mark.slow
def test_plots_for_which_there_is_data(plots, tmp_path) -> None:
    assert [p.name for p in plots] == [
        "epsilon-accuracy-cnn",
        "epsilon-accuracy-mlp",
        "epsilon-accuracy-logreg",
        "epsilon-frechet-efficientnet-lite0",
        "epsilon-frechet-pixels-pca",
    ]
    axes = {"stages.tau_coarse": [1, 2], "private.steps": [100, 200]}
    exp = make_experiment(
        tmp_path / "e",
        grid={"epsilon": [1], "variant": ["dpdm", "coarse"], "axes": axes, "seeds": 1},
        features=(),
    )
    names = [p.name for p in comparison_plots(View(exp))]
    assert "threshold-tau_coarse-accuracy-cnn-eps1" in names
    assert not [n for n in names if "cleaning" in n or "frechet" in n]
    bare = make_experiment(tmp_path / "f", grid={"epsilon": [1]}, classes=0, features=())
    assert not list(comparison_plots(View(bare)))


def test_alternative_text_has_the_numbers(view, plots) -> None:
    plot = plots[0]
    mean = sum(view.values(view.primary, 1.0, view.rows[0])) / 3
    assert f"DPDM at ε = 1: {mean:.4g} ± " in plot.alt
    assert "Both at ε = ∞" in plot.alt
    assert "trained on real images: 92" in plot.alt
    assert "DP-SGD classifier at ε = 1" in plot.alt


def test_every_seed_is_drawn(plots) -> None:
    """A mark for each run, beside one for each mean."""
    svg = plots[0].svg
    # Marks of one scatter share a definition and have the variant's colour.
    for variant in ("dpdm", "both"):
        colour = STYLES[variant][0]
        marks = re.findall(rf'<use [^>]*style="fill: {colour}; fill-opacity: 0.7', svg)
        assert len(marks) == 2 * 3


def test_files_are_the_same_each_time_and_old_ones_go(small, tmp_path) -> None:
    folder = tmp_path / "plots"
    written = write_plots(small, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {f"{p.name}.png" for p in written}
    (folder / "epsilon-accuracy-old.svg").write_text("")
    (folder / "notes.txt").write_text("mine")
    write_plots(small, folder)
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.pop("notes.txt") == b"mine"
    assert after == before
