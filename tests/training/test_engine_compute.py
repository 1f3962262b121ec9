"""How DP-SGD steps compute is kept with a run before noise is used, and is the same when it goes on."""

from __future__ import annotations

import json

import pytest

from dpsyngen.config import ComputeConfig, load_config
from dpsyngen.errors import RunError
from dpsyngen.hardware import Facts, Gpu, choose, decide
from dpsyngen.training.run import Run
from dpsyngen.training.session import EngineSettings, computed_with, fixed_settings


@pytest.fixture
def run(tmp_path, tiny_settings) -> Run:
    return Run.create(tmp_path / "run", load_config(tiny_settings))


def config(**compute):
    return load_config({"compute": compute})


GPU = Facts((Gpu("A100", (8, 0), 2**36),), "cuda")


def test_it_is_kept_and_taken_up(run) -> None:
    assert computed_with(run.engine_path) is None
    low = config(precision="bf16")
    first = EngineSettings.of(run.engine_path, low, choose("cpu", low.compute))
    assert first.compute is not None
    first.save()
    pins = {"device": "cpu", "precision": "bf16", "channels_last": False}
    assert computed_with(run.engine_path) == json.loads(run.engine_path.read_text())["compute"] == pins
    assert run.engine_path.stat().st_mode & 0o777 == 0o600
    # What is automatic in the next session follows the first.
    again = EngineSettings.of(run.engine_path, config(), choose("cpu"))
    assert again.compute is not None
    assert again.compute.precision == "bf16"


def test_what_cannot_be_taken_up_is_refused_before_anything_is_computed(run) -> None:
    first = EngineSettings.of(run.engine_path, config(), decide("cuda", ComputeConfig(), GPU))
    first.save()
    with pytest.raises(RunError, match=r"computed on 'cuda', and this session would on 'cpu': use --device cuda"):
        EngineSettings.of(run.engine_path, config(), choose("cpu"))
    old = Facts((Gpu("V100", (7, 0), 2**34),), "cuda")
    with pytest.raises(RunError, match=r"'tf32', but cuda:0 here has fp32 only.*same noise"):
        EngineSettings.of(run.engine_path, config(), decide("cuda", ComputeConfig(), old))
    asked = config(precision="bf16")
    with pytest.raises(RunError, match=r"precision is bf16, but .* was begun in tf32"):
        EngineSettings.of(run.engine_path, asked, decide("cuda", asked.compute, GPU))
    # Another GPU of the same kind will do, and so will the other number of the same machine.
    EngineSettings.of(run.engine_path, config(), decide("cuda", ComputeConfig(), GPU, local_rank=0))


def test_damage_is_named(run) -> None:
    run.engine_path.write_text('{"physical_batch": 3, "kernels": {}, "compute": 7}')
    with pytest.raises(RunError, match="cannot be read"):
        EngineSettings.of(run.engine_path, config(), choose("cpu"))
    assert computed_with(run.engine_path) is None


def test_settings_that_are_asked_for_are_fixed_and_automatic_ones_are_not_in_the_way() -> None:
    assert not [k for k in fixed_settings(config()) if k.startswith("compute.")]
    fixed = fixed_settings(config(precision="bf16", channels_last=True, compile=True))
    assert {k: v for k, v in fixed.items() if k.startswith("compute.")} == {
        "compute.precision": "bf16",
        "compute.channels_last": True,
    }


def test_all_settings_are_fixed_at_the_start_but_those_that_change_no_sum() -> None:
    """Other settings under the noise of before would let the difference of two sums be seen without noise."""
    compute = {"precision": "fp32", "channels_last": True, "compile": True}
    every = load_config({"compute": compute})
    sections = {name: values for name, values in every.model_dump(mode="json").items() if isinstance(values, dict)}
    named = {f"{section}.{name}" for section, values in sections.items() for name in values}
    after = {name for name in named if name.startswith(("sampling.", "logging."))}
    assert named - after - set(fixed_settings(every)) == {
        *("data.source", "data.cache", "data.workers", "privacy.budget", "privacy.groups", "compute.compile"),
        *("private.physical_batch", "private.checkpoint_every", "public.checkpoint_every"),
    }
