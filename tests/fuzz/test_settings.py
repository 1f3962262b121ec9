"""The configuration, from files and from Python, with values of every kind in every place."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpsyngen.cli.options import assignments
from dpsyngen.config import Config, load_config, preset_names, validate
from dpsyngen.errors import ConfigError, DpsyngenError
from tests.fuzz.mutations import spoil_bytes, spoil_value
from tests.fuzz.properties import accepted, examples, is_printable, nothing_else_happens, tried

numbers = st.integers(0, 2**64 - 1)
TEXTS = tuple(
    text.encode()
    for text in (
        Config().to_yaml(),
        "preset: demo\nprivate: {steps: 11, batch: 22}\nprivacy: {epsilon: .inf}\n",
        "# comment\nprogram:\n  name: mixture\n  params:\n    programs:\n"
        "      - dead-leaves\n      - {name: spectrum}\n",
        "a: &x [1, 2]\nb: *x\nc: !!binary aGk=\nd: !!python/name:os.system\n? [k]\n: {<<: *x}\n",
        "data: {source: 'it''s', labels: no}\nstages: {tau_cleaning: -1e-3, tau_coarse: 1_000.5}\n---\nx: |\n  t\n",
    )
)


def valid(make: Any, *arguments: Any, **options: Any) -> None:
    """A Config that survives being written and read, or a DpsyngenError of few words."""
    tried["settings"] += 1
    try:
        config = make(*arguments, **options)
    except DpsyngenError as error:
        is_printable(said := str(error))
        assert len(said) < 10_000
    else:
        assert validate(yaml.safe_load(config.to_yaml())) == config
        accepted["settings"] += 1


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "c.yaml"


@examples(80)
@given(numbers)
def _spoilt_text(file: Path, number: int) -> None:
    random = Random(number)
    file.write_bytes(spoil_bytes(random.choice(TEXTS), random.choice(TEXTS), random))
    with nothing_else_happens(file.parent):
        valid(load_config, file=file)


def test_spoilt_text(file: Path) -> None:
    _spoilt_text(file)


tokens = st.sampled_from(
    ["a", "a: ", "- ", "{", "}", "[", "]", ", ", "\n", "\n  ", "&x ", "*x", "!!str ", "!", "? ", ": ", "|", ">", "'",
     '"', "#", "%YAML 1.1\n", "---\n", "...\n", "<<: ", "0x", "0b_", "1:2:3", "2001-13-45", ".inf", ".nan", "~",
     "yes", "=", "\t", "\\", "\x85", "\u2028", "\ufeff", "9" * 500, "1e999", "\ud7ff", "private: ", "steps: "]
)  # fmt: skip


@examples(100)
@given(st.lists(tokens, max_size=40).map("".join))
def _made_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with nothing_else_happens(file.parent):
        valid(load_config, file=file)


def test_text_made_of_yaml_tokens(file: Path) -> None:
    _made_text(file)


@examples(160)
@given(numbers)
def test_spoilt_values(number: int) -> None:
    random = Random(number)
    base = load_config(preset=random.choice(preset_names())).model_dump(mode="json")
    base["program"]["params"] = {
        "shape": "square",
        "programs": ["dead-leaves", {"name": "spectrum", "weights": [1, 2]}],
    }
    spoilt = spoil_value(json.loads(json.dumps(base)), random)
    valid(validate, spoilt)
    if isinstance(spoilt, dict):
        valid(load_config, spoilt)


@examples(80)
@given(st.lists(tokens | st.sampled_from(["private.steps=", "private", ".", "=", "program.params.x="]), max_size=10))
def test_assignments(parts: list[str]) -> None:
    tried["settings"] += 1
    try:
        assignments(["".join(parts), "private.steps=3"])
    except ConfigError as error:
        is_printable(str(error))
    else:
        accepted["settings"] += 1


@examples(80)
@given(numbers)
def test_programs_with_spoilt_parameters(number: int) -> None:
    """What the configuration lets through as parameters of a program is judged by the program."""
    from dpsyngen.programs import make_program, program_names

    random = Random(number)
    name = random.choice(program_names())
    tried["programs"] += 1
    try:
        base = make_program(name, resolution=16, channels=1).config()
    except DpsyngenError:  # some need parameters of their own
        base = {"name": name, "seed": 0, "programs": ["dead-leaves"], "program": "dead-leaves"}
    spoilt = spoil_value({k: v for k, v in base.items() if k not in ("name", "resolution", "channels")}, random)
    if not isinstance(spoilt, dict) or not all(isinstance(k, str) for k in spoilt):
        return
    try:
        validate({"program": {"name": name, "params": {k: v for k, v in spoilt.items() if k != "seed"}}})
        make_program(name, **{**spoilt, "resolution": 16, "channels": 1})
    except DpsyngenError:
        return
    accepted["programs"] += 1
