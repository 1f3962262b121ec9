"""The configuration: presets are valid, precedence is as documented, bad input is named."""

from __future__ import annotations

import math

import pytest
import yaml

from dpsyngen.config import DEFAULT_PRESET, Config, load_config, preset_names, validate
from dpsyngen.diffusion.unet import named_size
from dpsyngen.errors import ConfigError
from dpsyngen.files import MAX_BYTES, read_yaml
from dpsyngen.programs import make_program


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_say_what_they_are(name) -> None:
    config = load_config(preset=name)
    assert config.preset == name
    named_size(config.network.size)
    channels = 3 if config.program.params.get("colour") == "rgb" else 1
    make_program(config.program.name, resolution=32, channels=channels, **config.program.params)


def test_default_preset_exists() -> None:
    assert load_config().preset == DEFAULT_PRESET


def test_precedence_of_overrides_file_and_preset(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: demo\nprivate: {steps: 11, batch: 22}\n")
    config = load_config({"private": {"batch": 33}}, file=file)
    assert (config.preset, config.private.steps, config.private.batch) == ("demo", 11, 33)
    assert config.network.size == load_config(preset="demo").network.size
    assert load_config(preset="cpu-small", file=file).preset == "cpu-small"
    assert load_config({"preset": "cpu-small"}, file=file).preset == "cpu-small"


def test_round_trip_through_yaml() -> None:
    for epsilon in (2.5, math.inf):
        config = load_config({"privacy": {"epsilon": epsilon}})
        assert validate(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "- a\n- b", "a: [", "just words"])
def test_hostile_or_broken_yaml(tmp_path, text) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file=file)


def test_binary_file_is_refused(tmp_path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(file=tmp_path / "c.yaml")


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"private": {"steps": 0, "stepz": 3}, "privacy": {"epsilon": -1}})
    for part in ("private.steps is 0", "private.stepz", "did you mean steps?", "privacy.epsilon is -1"):
        assert part in str(caught.value)


def test_settings_that_contradict_each_other() -> None:
    for settings, message in (
        ({"sampling": {"sigma_min": 90}}, "sigma_min = 90 must be below"),
        ({"sampling": {"churn": 3}}, "churn needs the sampler 'heun'"),
        ({"sampling": {"rho": 0.25}}, "rho = 0.25 is too small"),
        ({"private": {"steps": 5, "warmup": 5}}, "leaves none"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(settings)


def test_configuration_cannot_be_changed_afterwards() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.privacy.epsilon = 100  # type: ignore[misc]


HOSTILE_YAML = {
    "a: !!python/object/apply:os.system ['true']": "tags",
    "a: !!binary aGVsbG8=": "tags",
    "a: &x [1]\nb: *x": "anchors and aliases",
    "a: &x {b: *x}": "anchors and aliases",
    "privacy: {epsilon: 1}\nprivacy: {epsilon: 100}": "privacy is given twice",
    "privacy: {epsilon: 1, epsilon: 100}": "epsilon is given twice",
    "1: 2": "not text",
    "yes: 2": "not text",
    "? [a]\n: 1": "not text",
    "[" * 100_000: "nested",
    "{a: " * 50_000: "nested",
    "- " * 100_000: "nested",
    "a: [" + "1," * 30_000 + "]": "values",
    "a: " + "9" * 5000: "characters",
    "a: " + "1:" * 5000 + "1": "characters",
    "a: \x00": "not valid YAML",
    "a: \x1b[31m": "not valid YAML",
    "a: 1\n---\nb: 2": "single document",
    "a: 0b_": "not valid YAML",
    "": "mapping of sections",
    "~": "mapping of sections",
    "# " + "x" * 2**20: "larger than",
}


@pytest.mark.parametrize(("text", "why"), HOSTILE_YAML.items(), ids=range(len(HOSTILE_YAML)))
def test_hostile_yaml_is_refused_soon_and_in_few_words(tmp_path, text, why) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        load_config(file=tmp_path / "c.yaml")
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_text_beyond_the_limit_is_not_parsed() -> None:
    read_yaml("#" * MAX_BYTES, "it")
    with pytest.raises(ConfigError, match="1,048,577 characters; at most 1,048,576"):
        read_yaml("#" * (MAX_BYTES + 1), "it")


def test_text_that_only_looks_like_a_date_is_text(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("data: {source: 2024-02-31}\n")
    assert load_config(file=tmp_path / "c.yaml").data.source == "2024-02-31"


def test_files_that_are_none(tmp_path) -> None:
    (tmp_path / "pipe.yaml").symlink_to("/dev/zero")
    for path, why in (
        (tmp_path, "cannot be read"),
        (tmp_path / "pipe.yaml", "not a file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be a path"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_config(file=path)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("private", "steps", 10**18),
        ("private", "steps", 10**400),
        ("private", "steps", float("nan")),
        ("private", "steps", True),
        ("private", "batch", 10**12),
        ("private", "copies", 10**9),
        ("private", "learning_rate", 10**400),
        ("private", "learning_rate", float("inf")),
        ("private", "beta1", False),
        ("public", "steps", 10**18),
        ("public", "warmup", 10**18),
        ("sampling", "steps", 10**9),
        ("sampling", "rho", 1e-300),
        ("sampling", "sigma_max", 1e308),
        ("privacy", "epsilon", 1e5),
        ("privacy", "epsilon", 10**400),
        ("privacy", "epsilon", True),
        ("privacy", "clipping_norm", 1e-300),
        ("privacy", "insecure_seed", 10**400),
        ("network", "sigma_data", 1e-300),
        ("network", "size", "x" * 10**6),
        ("data", "records", 10**18),
        ("data", "source", "x" * 10**6),
        ("data", "source", "\ud800"),
        ("stages", "tau_coarse", 1e6),
        ("program", "seed", 2**64),
        ("program", "prior_tier", True),
    ],
)
def test_values_far_from_anything_useful(section, name, value) -> None:
    with pytest.raises(ConfigError, match=f"{section}.{name}") as caught:
        load_config({section: {name: value}})
    assert len(str(caught.value)) < 400


def test_the_largest_values_that_are_allowed() -> None:
    load_config({"privacy": {"epsilon": 10_000}, "private": {"steps": 10**6}, "data": {"records": 10**12}})
    load_config({"privacy": {"epsilon": math.inf}, "stages": {"pretrain": True}, "data": {"labels": False}})


def test_parameters_that_contain_themselves_or_are_no_numbers() -> None:
    recursive: dict = {}
    recursive["a"] = recursive
    laughs: list = ["lol"] * 9
    for _ in range(20):
        laughs = [laughs] * 9
    for value in (recursive, {"a": math.nan}, {"a": [math.inf]}, {"a" * 10**6: math.inf}, {"a": {(1, 2): 3}}):
        with pytest.raises(ConfigError, match=r"program\.params") as caught:
            load_config({"program": {"params": value}})
        assert len(str(caught.value)) < 500
    for place in ("network", "data", "preset", "private"):
        with pytest.raises(ConfigError) as caught:
            validate({place: laughs})
        assert len(str(caught.value)) < 1000


def test_messages_are_short_and_fit_for_a_terminal() -> None:
    evil = "\x1b]0;title\x07\u202e" + "x" * 10**6
    for settings in (
        {evil: 1},
        {"private": {evil: 1}},
        {"preset": evil},
        {"stages": {"variant": evil}},
        {"private": {f"{evil[:10_000]}{i}": i for i in range(1000)}},
        {"data": {"resolution": {evil: evil}}},
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(settings)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("values", [None, [], "text", 3, [("preset", "demo")]])
def test_a_configuration_that_is_no_mapping(values) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        validate(values)


def test_a_size_of_ones_own_does_without_the_prior_of_the_preset() -> None:
    given = {"privacy": {"epsilon": 1.0}}
    assert load_config(given, preset="cpu-small").network.prior == "shipped"
    assert load_config(given | {"network": {"size": "small"}}, preset="cpu-small").network.prior is None
    both = given | {"network": {"size": "small", "prior": "shipped"}}
    assert load_config(both, preset="cpu-small").network.prior == "shipped"
