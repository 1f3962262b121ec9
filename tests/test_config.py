"""The configuration: presets are valid, precedence is as documented, bad input is named."""

from __future__ import annotations

import math

import pytest
import yaml

from dpsyngen.config import DEFAULT_PRESET, Config, load_config, preset_names, validate
from dpsyngen.diffusion.unet import named_size
from dpsyngen.errors import ConfigError
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
        ({"stages": {"tau_cleaning": 2, "tau_coarse": 2}}, "must be below"),
        ({"sampling": {"sigma_min": 90}}, "sigma_min must be below"),
        ({"sampling": {"churn": 3}}, "needs sampling.sampler = heun"),
        ({"private": {"steps": 5, "warmup": 5}}, "leaves none"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(settings)


def test_configuration_cannot_be_changed_afterwards() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.privacy.epsilon = 100  # type: ignore[misc]
