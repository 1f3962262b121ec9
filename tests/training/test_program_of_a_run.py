"""The program of a run, with all its parameters and its prior tier, in configuration, ledger, statement and report."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

import dpsyngen
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.ledger import Ledger


def train(out: Path, settings: dict, images: tuple, **program: object):
    return dpsyngen.train(images, epsilon=8, out=out, settings=settings | {"program": program})


def test_tier_and_parameters_are_carried_everywhere(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    monkeypatch.setenv("DPSYNGEN_FONTS", str(Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf"))
    mixture = {"programs": ["strokes", {"name": "glyphs", "characters": "AB"}], "weights": [1, 3]}
    run = train(tmp_path / "r", tiny_settings, tiny_images(), name="mixture", params=mixture)

    config = run.config.program
    assert config.prior_tier == 2
    fonts = config.params["programs"][1]["fonts"]
    assert len(fonts) > 1
    assert all("@" in font for font in fonts)  # what None stood for, with hashes

    first = Ledger(run.ledger_path).entries[0]
    assert first.kind == "public"
    assert first.mechanism is None
    assert first.details["prior_tier"] == 2
    assert first.details["program"]["programs"] == config.params["programs"]
    assert "domain simulator" in first.details["prior_tier_meaning"]

    statement = json.loads((run.release / "privacy.json").read_text())
    assert statement["programmatic_images"]["prior_tier"] == 2
    assert statement["programmatic_images"]["weights"] == [1.0, 3.0]
    assert statement["epsilon"] == Ledger(run.ledger_path).epsilon()  # a public choice costs nothing
    assert "domain simulator" in (run.release / "PRIVACY.md").read_text()

    for report in dpsyngen.write_report(run):
        assert "mixture, prior tier 2: domain simulator" in report.read_text()
    # Where the fonts are missing, the report says so and is still written.
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("DPSYNGEN_FONTS", str(tmp_path / "empty"))
    for report in dpsyngen.write_report(run):
        assert "cannot be drawn on this machine" in report.read_text()


def test_without_programs_the_ledger_names_none(tmp_path, tiny_settings, tiny_images) -> None:
    settings = tiny_settings | {"stages": {"variant": "dpdm"}}
    run = train(tmp_path / "r", settings, tiny_images(), name="strokes")
    assert {e.kind for e in Ledger(run.ledger_path).entries} == {"dp"}


def test_a_wrong_tier_is_refused_before_anything_is_made(tmp_path, tiny_settings, tiny_images) -> None:
    with pytest.raises(ConfigError, match=r"prior_tier=0, but garments has prior tier 2.*domain simulator"):
        train(tmp_path / "r", tiny_settings, tiny_images(), name="garments", prior_tier=0)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("program", ["spectrum", "random-network", "fractal", "contours", "wavelet-marginal"])
def test_other_programs_train_too(program, tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), name=program)
    assert run.complete
    assert len(dpsyngen.Generator(str(run.release)).sample(3).images) == 3  # a path as text will do
