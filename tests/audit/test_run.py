"""The whole audit of a run: what it writes, what it says, and its exit code."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

import dpsyngen.audit.run as audit_module
import dpsyngen.audit.sensitivity as sensitivity
import dpsyngen.privacy.noise as noise
from dpsyngen.audit.run import Effort, audit_run
from dpsyngen.cli.checks import audit
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.run import Run
from tests.training.short_runs import start

pytestmark = pytest.mark.slow

SMALL = Effort(trials=2000, canaries=8, steps=7, lookup_canaries=300, lookup_steps=10, sparse_steps=25)
CONFIDENCE = 1 - 1e-6


def train(folder: Path, settings: dict, images, unfinished: bool = False, **sections: dict) -> Run:
    config = load_config({**settings, "privacy": {"epsilon": 8.0}, "stages": {"variant": "dpdm"}, **sections})
    training = start(config, load_images(images), folder)
    with training.run.lock():
        for _ in training.steps():
            if unfinished:
                break
    return training.run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_audit_of_a_run(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images())
    before, ledger = contents(run.release), run.ledger_path.read_bytes()
    told: list[str] = []
    report = audit_run(run, effort=SMALL, confidence=CONFIDENCE, on_progress=told.append)
    assert report.passed, report.failures
    assert len(told) == 6
    # The release and the ledger are as they were: nothing private was used.
    assert contents(run.release) == before
    assert run.ledger_path.read_bytes() == ledger
    path = run.private / "audit" / "audit.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    stored = json.loads(path.read_text())
    assert stored["passed"] is True
    assert stored["epsilon"] == Ledger(run.ledger_path).epsilon()
    assert 0 < stored["step"]["epsilon_lower"] < 1.2 * stored["step"]["epsilon_claimed"]
    assert 0 <= stored["one_run"]["epsilon_lower"] <= stored["one_run"]["epsilon_claimed"]
    # The tests of all parts share the error.
    tests = [f for f in stored["findings"] if f["p_value"] is not None]
    assert sum(f["level"] for f in tests) == pytest.approx(1e-6)
    assert len({f["part"] for f in stored["findings"]}) == 6
    text = "\n".join(report.lines())
    assert "No audit contradicts the claim" in text
    assert "passing proves no upper bound" in text
    assert "FAIL" not in text


def test_command_prints_and_exits_with_4_on_a_contradiction(
    tmp_path, tiny_settings, tiny_images, monkeypatch, capsys
) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images())
    monkeypatch.setattr(audit_module, "QUICK", SMALL)
    audit(run.path, quick=True, confidence=CONFIDENCE)
    out = capsys.readouterr()
    assert "ε ≥" in out.out
    assert "training run" not in out.err
    real = noise.noisy_mean
    monkeypatch.setattr(
        noise, "noisy_mean", lambda total, **k: real(total, **(k | {"noise_multiplier": k["noise_multiplier"] / 2}))
    )
    with pytest.raises(typer.Exit) as stopped:
        audit(run.path, quick=True, confidence=CONFIDENCE, quiet=True)
    assert stopped.value.exit_code == 4
    out = capsys.readouterr()
    assert "CONTRADICTED" in out.out
    assert "FAIL  a step hides a worst-case record" in out.out
    assert not out.err
    assert json.loads((run.private / "audit" / "audit.json").read_text())["passed"] is False


def test_run_without_privacy_says_what_could_not_be_audited(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), privacy={"epsilon": math.inf})
    report = audit_run(run, effort=SMALL, confidence=CONFIDENCE)
    assert report.passed
    assert list(report.parts) == ["this run's books"]
    assert report.bounds == []
    assert "ε = ∞" in "\n".join(report.lines())
    assert json.loads((run.private / "audit" / "audit.json").read_text())["epsilon"] == "inf"


def test_run_without_dp_sgd_has_nothing_to_attack_and_says_so(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), stages={"variant": "gaussian"})
    report = audit_run(run, effort=SMALL, confidence=CONFIDENCE)
    assert report.passed
    assert list(report.parts) == ["this run's books"]
    assert report.bounds == []
    text = "\n".join(report.lines())
    assert "no DP-SGD steps, so there is none to attack" in text
    assert "NOT PRIVATE" not in text


def test_a_residual_network_is_audited_with_its_own_moments(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    seen = []
    real = sensitivity.lively_denoiser

    def looked(*args, **kwargs) -> NetworkDenoiser:
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(sensitivity, "lively_denoiser", looked)
    stages = {"variant": "residual", "tau_coarse": 1.0}
    run = train(tmp_path / "r", tiny_settings, tiny_images(), stages=stages)
    report = audit_run(run, effort=SMALL, confidence=CONFIDENCE)
    assert report.passed, report.failures
    (denoiser,) = seen
    assert denoiser.gaussian is not None
    kept = load_file(run.weights("gaussian"))
    assert torch.equal(denoiser.gaussian.gaussians.means, kept["means"])
    assert len({f["part"] for f in report.to_dict()["findings"]}) == 6
    assert "of the DP moments only the charges were looked at" in "\n".join(report.lines())


def test_run_with_a_seed_is_audited_and_called_not_private(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), privacy={"epsilon": 8.0, "insecure_seed": 3})
    report = audit_run(run, effort=SMALL, confidence=CONFIDENCE)
    assert report.passed, report.failures
    assert any("--insecure-seed" in note for note in report.notes)


def test_other_settings_are_audited_too(tmp_path, tiny_settings, tiny_images) -> None:
    """Images without classes, discrete noise, K = 1."""
    images, _ = tiny_images()
    tiny_settings["private"] |= {"noise": "discrete", "copies": 1}
    report = audit_run(train(tmp_path / "r", tiny_settings, (images, None)), effort=SMALL, confidence=CONFIDENCE)
    assert report.passed, report.failures
    assert report.step is not None
    assert report.step["slots"] > 1


def test_refusals(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), unfinished=True)
    with pytest.raises(RunError, match="not finished"):
        audit_run(run, effort=SMALL)
    for wrong in (0.5, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="confidence"):
            audit_run(run, effort=SMALL, confidence=wrong)
