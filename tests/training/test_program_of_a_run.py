"""The program of a run, with all its parameters and its prior tier, in configuration, ledger, statement and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dpsyngen
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.ledger import Ledger

pytestmark = pytest.mark.slow


def train(out: Path, settings: dict, images: tuple, **program: object):
    return dpsyngen.train(images, epsilon=8, out=out, settings=settings | {"program": program})


def test_tier_and_parameters_are_carried_everywhere(tmp_path, tiny_settings, tiny_images) -> None:
    mixture = {"programs": ["strokes", {"name": "contours", "shape": "polygon"}], "weights": [1, 3]}
    run = train(tmp_path / "r", tiny_settings, tiny_images(), name="mixture", params=mixture)

    config = run.config.program
    assert config.prior_tier == 1
    assert config.params["programs"][1]["figures"] == [1, 3]  # the default, written out

    first = Ledger(run.ledger_path).entries[0]
    assert first.kind == "public"
    assert first.mechanism is None
    assert first.details["prior_tier"] == 1
    assert first.details["program"]["programs"] == config.params["programs"]
    assert "generic shape" in first.details["prior_tier_meaning"]

    statement = json.loads((run.release / "privacy.json").read_text())
    assert statement["programmatic_images"]["prior_tier"] == 1
    assert statement["programmatic_images"]["weights"] == [1.0, 3.0]
    assert statement["epsilon"] == Ledger(run.ledger_path).epsilon()  # a public choice costs nothing
    assert "generic shape" in (run.release / "PRIVACY.md").read_text()

    for report in dpsyngen.write_report(run):
        assert "mixture, prior tier 1: generic shape" in report.read_text()


def test_without_programs_the_ledger_names_none(tmp_path, tiny_settings, tiny_images) -> None:
    settings = tiny_settings | {"stages": {"variant": "dpdm"}}
    run = train(tmp_path / "r", settings, tiny_images(), name="strokes")
    assert {e.kind for e in Ledger(run.ledger_path).entries} == {"dp"}


def test_a_wrong_tier_is_refused_before_anything_is_made(tmp_path, tiny_settings, tiny_images) -> None:
    with pytest.raises(ConfigError, match=r"prior_tier=0, but strokes has prior tier 1.*generic shape"):
        train(tmp_path / "r", tiny_settings, tiny_images(), name="strokes", prior_tier=0)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("program", ["spectrum", "random-network", "fractal", "contours", "wavelet-marginal"])
def test_other_programs_train_too(program, tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), name=program)
    assert run.complete
    assert len(dpsyngen.Generator(str(run.release)).sample(3).images) == 3  # a path as text will do
