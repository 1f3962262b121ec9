"""The engine's options as a run uses them: exact noise, clipping styles, and what is kept for a resumed run."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dpsyngen.training.private as private_module
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.diffusion.loss import NoiseLevels
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.clipping import GridGradient
from dpsyngen.privacy.exact import DiscreteGaussian
from dpsyngen.privacy.kernels import KERNELS, KernelChoices
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import shape_of
from dpsyngen.training.private import Computing, DpSgd
from dpsyngen.training.run import Run
from tests.training.short_runs import resume, start


def begin(settings: dict, data, out: Path, seed: int | None = 7, **private) -> Training:
    sections = settings | {
        "privacy": {"epsilon": 8, "insecure_seed": seed},
        "stages": {"variant": "dpdm"},
        "private": settings["private"] | private,
    }
    return start(load_config(sections), load_images(data), out)


def weights(out: Path) -> torch.Tensor:
    (path,) = (out / "release" / "weights").iterdir()
    return torch.cat([t.flatten() for t in load_file(path).values()])


def finish(training: Training) -> None:
    for _ in training.steps():
        pass


def test_discrete_noise_is_used_and_said(tiny_settings, tiny_images, tmp_path, monkeypatch) -> None:
    kinds = []
    real = DiscreteGaussian.release

    def spy(self, total, *rest):
        kinds.append(type(total))
        return real(self, total, *rest)

    monkeypatch.setattr(DiscreteGaussian, "release", spy)
    finish(begin(tiny_settings, tiny_images(), tmp_path / "d", noise="discrete"))
    assert kinds == [GridGradient] * 6
    assert torch.isfinite(weights(tmp_path / "d")).all()
    entries = Ledger(tmp_path / "d" / "private" / "ledger.jsonl").entries
    assert {e.details["noise"] for e in entries if "noise" in e.details} == {"discrete"}
    statement = json.loads((tmp_path / "d" / "release" / "privacy.json").read_text())
    assert [m["mechanism"] for m in statement["mechanisms"]] == ["Poisson-subsampled discrete Gaussian"]
    assert "discrete Gaussian" in (tmp_path / "d" / "release" / "PRIVACY.md").read_text()
    # The same clipped sums and a noise of the same size; the numbers of the noise differ.
    finish(begin(tiny_settings, tiny_images(), tmp_path / "g"))
    assert not torch.equal(weights(tmp_path / "d"), weights(tmp_path / "g"))


@pytest.mark.parametrize("style", ["per-layer", "automatic"])
def test_clipping_style_reaches_the_engine(tiny_settings, tiny_images, tmp_path, monkeypatch, style) -> None:
    seen = []
    real = private_module.PerExampleGradients

    def spy(*args, **kwargs):
        seen.append(kwargs["style"])
        return real(*args, **kwargs)

    monkeypatch.setattr(private_module, "PerExampleGradients", spy)
    finish(begin(tiny_settings, tiny_images(), tmp_path / "r", clipping=style))
    assert seen == [style]  # one engine for the whole run


def test_discrete_noise_with_another_clipping_style_is_refused(tiny_settings, tiny_images, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"needs private\.clipping = flat"):
        begin(tiny_settings, tiny_images(), tmp_path / "r", noise="discrete", clipping="automatic")
    assert not (tmp_path / "r").exists()


def test_what_was_measured_is_kept_in_the_private_half(tiny_settings, tiny_images, tmp_path) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", seed=None, physical_batch=None)
    finish(training)
    path = tmp_path / "r" / "private" / "engine.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = json.loads(path.read_text())
    assert kept["kernels"]
    assert set(kept["kernels"].values()) <= set(KERNELS)
    assert kept["milliseconds"]
    assert 1 <= kept["physical_batch"] <= 64
    assert not list((tmp_path / "r" / "release").rglob("engine*"))


def test_resumed_run_computes_the_way_it_began(tiny_settings, tiny_images, tmp_path) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", seed=None)
    for progress in training.steps():
        if progress.step == 2:
            training.stop_requested = True
    path = tmp_path / "r" / "private" / "engine.json"
    kept = json.loads(path.read_text())
    signature = next(s for s in kept["kernels"] if "3x3" in s)
    kept["kernels"][signature] = "each"
    kept["physical_batch"] = 3
    path.write_text(json.dumps(kept))
    again = resume(Run(tmp_path / "r"), load_images(tiny_images()))
    finish(again)
    assert json.loads(path.read_text())["kernels"][signature] == "each"


def test_damaged_measurements_are_named(tiny_settings, tiny_images, tmp_path) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", seed=None)
    for progress in training.steps():
        if progress.step == 2:
            training.stop_requested = True
    (tmp_path / "r" / "private" / "engine.json").write_text("{}")
    with pytest.raises(RunError, match="remove it"):
        finish(resume(Run(tmp_path / "r"), load_images(tiny_images())))


def test_noise_of_a_step_does_not_depend_on_memory_or_cores(tiny_settings, tiny_images, tmp_path) -> None:
    """σ, noise and dropped labels belong to the step, so a repeated step is the same step on any machine."""
    results = []
    for name, threads, physical in (("a", 1, 1), ("b", 1, 100), ("c", 3, 5)):
        torch.set_num_threads(threads)
        try:
            finish(begin(tiny_settings, tiny_images(), tmp_path / name, physical_batch=physical))
        finally:
            torch.set_num_threads(1)
        results.append(weights(tmp_path / name))
    for other in results[1:]:
        # Rounding only: other noise levels would move the weights by thousands of times as much.
        assert (results[0] - other).abs().max() < 2e-4


@pytest.mark.parametrize("part", [slice(0, 60), slice(7, 41), slice(20, 20)])
def test_rows_that_are_made_side_by_side_are_the_same_rows(part, tiny_settings, tiny_images) -> None:
    """As for a GPU: one worker takes the pass, several threads make its noise."""
    config = load_config(tiny_settings)
    dataset, chosen = load_images(tiny_images()), np.arange(60)
    denoiser = make_denoiser(config, shape_of(dataset, config), True, seed=0)
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            how = Computing(100, KernelChoices(measure=False))
            dp = DpSgd(60, 1.0, 1.0, config.private)
            take = private_module.PrivateStep(dataset, NoiseLevels(), 0.1, dp, Randomness.from_insecure_seed(1), how)
            made.append(take._noisy(chosen, part, denoiser, 3))
        finally:
            torch.set_num_threads(1)
    for name in ("clean", "noisy", "sigma", "labels"):
        assert torch.equal(getattr(made[0], name), getattr(made[1], name))
    assert len(made[0].sigma) == (part.stop - part.start) * config.private.copies
