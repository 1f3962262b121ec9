"""Specifications of experiments: what is read, and what is refused before anything is done."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from dpsyngen.errors import ConfigError, DataError
from dpsyngen.experiments.runner import Images
from dpsyngen.experiments.spec import jobs_of, load_spec, parse_spec, spec_names

SMALL = {"name": "x", "data": {"train": "digits", "test": "digits:test"}}


@pytest.mark.parametrize("name", spec_names())
def test_specifications_that_ship_are_valid_and_come_back_from_their_own_text(name, tmp_path) -> None:
    spec = load_spec(name)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    assert load_spec(tmp_path / "spec.yaml") == spec
    assert spec.data.facts is not None  # so that --dry-run works without the images


def test_defaults_are_the_five_variants_at_two_budgets_with_three_seeds() -> None:
    g = parse_spec(SMALL).grid
    assert g.variant == ("dpdm", "finetune", "cleaning", "coarse", "both")
    assert (g.epsilon, g.seeds) == ((1.0, 10.0), (0, 1, 2))


def test_seeds_may_be_counted_and_epsilon_infinite() -> None:
    g = parse_spec({**SMALL, "grid": {"seeds": 2, "epsilon": ["inf", 3]}}).grid
    assert (g.epsilon, g.seeds) == ((math.inf, 3.0), (0, 1))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"grid": {"variant": ["dpdm", "nonsense"]}}, "nonsense"),
        ({"grid": {"variant": []}}, "empty"),
        ({"grid": {"variant": ["dpdm", "dpdm"]}}, "twice"),
        ({"grid": {"epsilon": [0]}}, "above 0"),
        ({"grid": {"epsilon": [1e9]}}, "at most"),
        ({"grid": {"epsilon": [float("nan")]}}, "above 0"),
        ({"grid": {"seeds": [-1]}}, "greater than or equal to 0"),
        ({"grid": {"seeds": True}}, "how many"),
        ({"grid": {"axes": {"stages.tau_corse": [1]}}}, "no setting 'stages.tau_corse'"),
        ({"grid": {"axes": {"stages.tau_coarse": []}}}, "empty"),
        ({"grid": {"axes": {"network.seed": [1, 2]}}}, "grid.seeds"),
        ({"grid": {"axes": {"sampling.steps": [1, 2]}}}, "sampling section"),
        ({"grid": {"cases": [{"label": "a b"}]}}, "label is 'a b'"),
        ({"grid": {"cases": [{"label": "a"}, {"label": "a", "settings": {"private.steps": 3}}]}}, "same label"),
        (
            {"grid": {"axes": {"private.steps": [3]}, "cases": [{"label": "a", "settings": {"private.steps": 3}}]}},
            "one place",
        ),
        ({"settings": {"privacy": {"epsilon": 3}}}, "grid.epsilon"),
        ({"settings": {"stages": {"variant": "both"}}}, "grid.variant"),
        ({"settings": {"private": 3}}, "section"),
        ({"preset": "nonsense"}, "preset"),
        ({"baseline": "nonsense"}, "baseline"),
        ({"references": ["nonsense"]}, "nonsense"),
        ({"noise": "seeded", "cost": {"total_epsilon": 3}}, "seeded"),
        ({"grid": {"epsilon": ["inf"]}, "cost": {"total_epsilon": 3}}, "inf"),
        ({"cost": {"hours": 0}}, "hours"),
        ({"evaluation": {"features": ["nonsense"]}}, "nonsense"),
        ({"evaluation": {"metrics": ["nonsense"]}}, "nonsense"),
        ({"evaluation": {"classifiers": ["nonsense"]}}, "nonsense"),
        ({"evaluation": {"bootstrap": 3}}, "bootstrap"),
        ({"data": {"train": "digits"}}, "data.test"),
        ({"data": {"train": "digits", "test": "digits:test", "labels": False}}, "classify"),
        ({"surprise": 1}, "no such setting"),
        ({"name": None}, "name"),
    ],
)
def test_a_wrong_entry_is_named(change, word) -> None:
    with pytest.raises(ConfigError, match=word.replace(".", r"\.")):
        parse_spec({**SMALL, **change})


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_spec({**SMALL, "noise": "loud", "sampling": {"images": 0}})
    assert "noise" in str(error.value)
    assert "sampling.images" in str(error.value)


def test_a_missing_file_says_what_there_is(tmp_path) -> None:
    with pytest.raises(ConfigError, match="paper-small"):
        load_spec(tmp_path / "none.yaml")


def test_a_list_is_no_specification(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_spec(tmp_path / "x.yaml")


def test_images_are_read_by_the_settings_of_a_run() -> None:
    """All of the section "data", and with the images of a person that frames of DICOM files need."""
    asked = {"label_column": "finding", "labels": "l.csv", "window": "40,400", "frames": "all", "fit": "pad"}
    asked |= {"skip_bad": True, "records": 500}
    settings = {"privacy": {"group_size": 4}}
    spec = parse_spec({"name": "x", "data": {"train": "t", "test": "u", **asked}, "settings": settings})
    config = jobs_of(spec)[0].config
    assert (config.data.source, config.data.window, config.privacy.group_size) == ("t", (40, 400), 4)
    assert {name: getattr(config.data, name) for name in asked} == asked | {"window": (40, 400)}
    assert parse_spec(yaml.safe_load(spec.to_yaml())) == spec
    with pytest.raises(ConfigError, match="the images are data"):
        parse_spec({"name": "x", "data": {"train": "t", "test": "u", "source": "v"}})


def test_test_images_are_read_as_the_training_images(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 8, 8), dtype=np.uint16)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=pixels, kind=np.arange(40) % 2, batch=np.arange(40) % 3)
    paths = {name: str(tmp_path / f"{name}.npz") for name in ("train", "test")}
    asked = {"value_range": [0, 4095], "label_column": "kind"}
    images = Images(parse_spec({"name": "x", "data": {**paths, **asked}}))
    assert images.train.num_classes == images.test.num_classes == 2
    assert images.train.fingerprint() == images.test.fingerprint()
    assert images.train.array().max() > 200
    # What all runs cost is planned for the number of records that they will be run with.
    assert Images(parse_spec({"name": "x", "data": {**paths, **asked, "records": 50}})).shape.records == 50
    np.savez(tmp_path / "colour.npz", images=np.zeros((40, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "large.npz", images=np.zeros((40, 12, 12), np.uint8))
    data = {"train": paths["train"], "labels": False}
    spec = {"name": "x", "evaluation": {"classifiers": []}}
    with pytest.raises(DataError, match="not both grey"):
        Images(parse_spec({**spec, "data": {**data, "test": str(tmp_path / "colour.npz")}}))
    with pytest.warns(UserWarning, match=r"12 pixels a side, and those of .* 8: they are resized"):
        other = Images(parse_spec({**spec, "data": {**data, "test": str(tmp_path / "large.npz")}}))
    assert other.test.resolution == 8  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="have no classes: leave"):
        Images(parse_spec({**spec, "data": data | {"test": paths["test"]}, "sampling": {"guidance": 2}}))
