"""Each way in which a run can go wrong is found and named, and a healthy one is left in peace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpsyngen.config import PrivateConfig, load_config, preset_names
from dpsyngen.data import load_images
from dpsyngen.errors import RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.programs import make_program
from dpsyngen.training.findings import Facts, Finding, by_severity, of_images, of_losses, of_private_training
from dpsyngen.training.health import answers_finite, stopped_because, weights_finite
from dpsyngen.training.pipeline import Training
from dpsyngen.training.private import DpSgd, PrivateStep, charged_steps
from dpsyngen.training.public import PublicStep
from dpsyngen.training.run import Run
from tests.training.short_runs import start

pytestmark = pytest.mark.slow


# `make demo`: 1,437 digits, the nano network, ε = 10.
def demo(
    steps: int = 200,
    batch: int = 512,
    noise_multiplier: float = 2.41,
    clipping_norm: float = 1.0,
    clipping: Literal["flat", "automatic"] = "flat",
    parameters: int = 100_929,
    **facts: bool,
) -> Facts:
    dp = DpSgd(1437, noise_multiplier, clipping_norm, PrivateConfig(steps=steps, batch=batch, clipping=clipping))
    return Facts(dp, parameters, **{"pretrained": False, "complete": True, **facts})


DEMO = demo()


def log(losses, *, examples: int = 512, clipped: float = 0.8, median_norm: float = 2.0, not_finite: int = 0) -> list:
    values = {"phase": "context", "examples": examples, "clipped": clipped, "median_norm": median_norm}
    return [{**values, "step": i, "loss": float(v), "not_finite": not_finite} for i, v in enumerate(losses, 1)]


def falling(steps: int = 200, noise: float = 0.03, seed: int = 0) -> np.ndarray:
    """A loss like that of `make demo`: 1.4, falling to 0.55."""
    step = np.arange(steps)
    return 0.55 + 0.85 * np.exp(-step / 40) + noise * np.random.default_rng(seed).normal(size=steps)


def found(findings: list[Finding]) -> dict[str, str]:
    return {f.code: f.severity for f in findings}


# ------------------------------------------------------------------------------------------------ losses


def test_a_healthy_run_is_left_in_peace() -> None:
    for seed in range(20):
        assert found(of_private_training(log(falling(seed=seed)), DEMO)) == {}
        noisy = log(falling(noise=0.2, seed=seed), examples=8)
        assert found(of_private_training(noisy, demo(batch=8, noise_multiplier=0.0))) == {}
    # A loss that is flat after a quick start has learned.
    quick = 0.5 + np.r_[0.9, 0.5, 0.2, np.zeros(1000)] + 0.02 * np.random.default_rng(0).normal(size=1003)
    assert found(of_private_training(log(quick), demo(steps=1003))) == {}


@pytest.mark.parametrize(
    ("losses", "code", "severity"),
    [
        (np.r_[1.4, 1.2, np.full(198, np.nan)], "loss-not-finite", "error"),
        (np.r_[1.4, 1.2, np.full(198, np.inf)], "loss-not-finite", "error"),
        (np.r_[falling(199)[:100], np.nan, falling(199)[100:]], "loss-not-finite", "warning"),
        (np.geomspace(1.4, 1e9, 200), "diverged", "error"),
        (np.r_[1.4, np.full(199, 50.0)], "diverged", "error"),
        (np.r_[1e12, np.geomspace(1e12, 1e3, 199)], "diverged", "error"),
        (np.r_[falling(100), np.linspace(0.6, 2.5, 100)], "diverged", "error"),
        (np.r_[1.4, np.geomspace(100, 1.2, 60), np.full(139, 1.2)], "loss-exploded", "warning"),
        (np.r_[falling(100), np.linspace(0.6, 1.0, 100)], "loss-rose", "warning"),
        (1.4 + 0.03 * np.random.default_rng(0).normal(size=200), "nothing-learned", "error"),
        (np.full(200, 1.4), "nothing-learned", "error"),
        (np.linspace(1.4, 1.3, 200) + 0.3 * np.random.default_rng(1).normal(size=200), "nothing-learned", "warning"),
    ],
)
def test_losses_that_went_wrong(losses, code, severity) -> None:
    assert found(of_private_training(log(losses), DEMO)) == {code: severity}


def test_a_single_bad_step_is_not_divergence() -> None:
    losses = falling()
    losses[[50, 120, 199]] = 1e6
    assert found(of_private_training(log(losses), DEMO)) == {}


def test_a_pretrained_or_unfinished_run_may_have_learned_nothing_yet() -> None:
    flat = log(np.full(200, 0.6))
    for facts in (demo(pretrained=True), demo(complete=False)):
        assert found(of_private_training(flat, facts)) == {"nothing-learned": "warning"}


def test_what_the_presets_use_is_said_as_it_is() -> None:
    (flat,) = of_private_training(log(np.full(200, 1.4)), DEMO)
    rates = [load_config(preset=name).private.learning_rate for name in preset_names()]
    said = re.search(r"the presets use (\S+) to (\S+)\)", flat.change)
    assert said is not None
    assert [float(rate) for rate in said.groups()] == [min(rates), max(rates)]


def test_a_residual_network_is_measured_against_its_own_start() -> None:
    """Its loss has no bound before training: it is what the DP moments lack."""
    residual = demo(residual=True)
    for scale in (1.0, 9.0):
        assert found(of_private_training(log(scale * falling()), residual)) == {}
    assert found(of_private_training(log(9 * falling()), DEMO)) == {"diverged": "error"}
    assert found(of_private_training(log(np.r_[np.full(5, 0.9), np.full(195, 2.0)]), residual)) == {"diverged": "error"}
    # Moments draw images without it, so that it learned nothing is no error.
    (flat,) = of_private_training(log(np.full(200, 0.95)), residual)
    assert (flat.code, flat.severity) == ("nothing-learned", "warning")
    assert "variant gaussian" in flat.change
    (noisy,) = of_private_training(log(falling()), demo(residual=True, noise_multiplier=100.0))
    assert "--variant gaussian" in noisy.change
    assert "--pretrain" not in noisy.change


def test_findings_say_what_they_rest_on_and_what_to_do() -> None:
    bad = log(np.geomspace(1.4, 1e9, 200))
    (private,), (public,) = of_losses(bad, "context", "--lr", "private"), of_losses(bad, "coarse", "x.y", "released")
    assert private.basis == "private"
    assert public.basis == "released"
    assert "lower the learning rate, --lr" in private.change
    assert "--epsilon" not in public.change
    assert "1e+09" in private.seen or "e+08" in private.seen


# ------------------------------------------------------------------------------- examples, clipping, noise


@pytest.mark.parametrize(
    ("values", "facts", "code", "severity"),
    [
        ({"examples": 100}, {}, "few-examples", "warning"),
        ({"examples": 0, "median_norm": 0.0}, {}, "few-examples", "error"),
        ({"not_finite": 1}, {}, "gradients-not-finite", "warning"),
        ({"not_finite": 200}, {}, "gradients-not-finite", "error"),
        ({"clipped": 0.0, "median_norm": 0.05}, {}, "nothing-clipped", "warning"),
        ({"clipped": 0.0, "median_norm": 0.05}, {"clipping": "per-layer"}, "nothing-clipped", "warning"),
        ({"clipped": 0.0}, {"clipping_norm": 1e9}, "nothing-clipped", "error"),
        ({"clipped": 1.0}, {"clipping_norm": 1e-9}, "steps-vanish", "error"),
        ({}, {"noise_multiplier": 30.0}, "noise-dominates", "warning"),
        ({}, {"noise_multiplier": 300.0}, "noise-dominates", "error"),
        ({}, {"parameters": 1_000_000_000}, "noise-dominates", "error"),
    ],
)
def test_settings_that_get_in_the_way(values, facts, code, severity) -> None:
    result = found(of_private_training(log(falling(), **values), demo(**facts)))
    assert result.get(code) == severity, result


def test_automatic_clipping_always_clips_and_no_noise_means_no_advice_on_it() -> None:
    everything = log(falling(), clipped=1.0)
    assert found(of_private_training(everything, demo(clipping="automatic"))) == {}
    unclipped = log(falling(), clipped=0.0, median_norm=0.0)
    assert found(of_private_training(unclipped, demo(noise_multiplier=0.0))) == {}


def test_a_clipping_norm_must_not_be_chosen_by_private_norms() -> None:
    unclipped = log(falling(), clipped=0.0, median_norm=0.05)
    (finding,) = (f for f in of_private_training(unclipped, DEMO) if f.code == "nothing-clipped")
    assert finding.basis == "private"
    assert "public images" in finding.change
    assert "ε does not cover" in finding.change


def test_few_steps_and_no_log() -> None:
    assert found(of_private_training([], demo(steps=10))) == {"few-steps": "warning"}


def test_errors_come_first() -> None:
    findings = [
        Finding(c, s, "", "", "") for c, s in (("a", "warning"), ("b", "error"), ("c", "warning"), ("d", "error"))
    ]
    assert [f.code for f in by_severity(findings)] == ["b", "d", "a", "c"]


# ------------------------------------------------------------------------------------------------ images

LABELS = np.arange(80) % 10


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_images("digits")
    rows = np.concatenate([np.flatnonzero(data.labels == k)[:8] for k in range(10)])
    return data.images[rows], data.labels[rows]


def test_pictures_are_left_in_peace() -> None:
    images, labels = digits()
    assert found(of_images(images, labels, tuple("0123456789"))) == {}
    leaves = make_program("dead-leaves", resolution=28, channels=3, seed=0).batch(range(40))
    assert found(of_images(leaves)) == {}


@pytest.mark.parametrize("level", [0, 130, 255])
def test_blank_images(level) -> None:
    blank = np.full((80, 1, 8, 8), level, np.uint8)
    (finding,) = of_images(blank, LABELS)
    assert (finding.code, finding.severity, finding.basis) == ("blank-images", "error", "released")
    assert {0: "black", 130: "grey", 255: "white"}[level] in finding.seen
    images, _ = digits()
    images[:16] = level
    assert found(of_images(images))["blank-images"] == "warning"


def test_noise_images() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    assert found(of_images(noise, LABELS)) == {"noise-images": "error"}


def test_one_image_over_and_over() -> None:
    images, _ = digits()
    wobble = np.random.default_rng(0).integers(0, 3, (80, 1, 8, 8))
    same = (images[[5]].astype(int) + wobble).clip(0, 255).astype(np.uint8)
    assert found(of_images(same, LABELS)) == {"collapsed": "error"}
    (finding,) = of_images(same)
    assert "80 generated images show 1 different" in finding.seen
    few = images[np.arange(80) % 20]
    assert found(of_images(few)) == {"collapsed": "warning"}


def test_one_image_a_class() -> None:
    images, labels = digits()
    first = images[[np.flatnonzero(labels == k)[0] for k in range(10)]]
    names = tuple("abcdefghij")
    assert found(of_images(first[LABELS], LABELS, names))["collapsed"] == "warning"
    assert found(of_images(first[LABELS], LABELS, names))["classes-collapsed"] == "error"
    images[labels == 3] = first[3]
    (finding,) = of_images(images, labels, names)
    assert (finding.code, finding.severity) == ("classes-collapsed", "warning")
    assert finding.seen.endswith(": d")


def test_a_label_that_is_ignored() -> None:
    images, labels = digits()
    ignored = sum(
        "label-ignored" in found(of_images(images, np.random.default_rng(seed).permutation(labels)))
        for seed in range(10)
    )
    # At a level of 1 %, one of ten may pass for a difference by chance; two would be one in 200.
    assert ignored >= 9


# ----------------------------------------------------------------------------------------- finite weights


def begin(settings: dict, images, out: Path, epsilon: float = np.inf, **private) -> Training:
    values = {k: dict(v) for k, v in settings.items()}
    values["privacy"] = {"epsilon": epsilon, "insecure_seed": 7}
    values["stages"] = {"variant": "cleaning"}
    config = load_config(values)
    # Past the limits of the configuration, as no limit keeps every network finite.
    private_config = config.private.model_copy(update=private)
    return start(config.model_copy(update={"private": private_config}), load_images(images), out)


def take(training: Training) -> int:
    return sum(1 for _ in training.steps())


def test_weights_finite() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    assert weights_finite(module.state_dict().values())
    for value in (float("nan"), float("inf"), 1e30):
        with torch.no_grad():
            module[0].bias[1] = value
        assert not weights_finite(module.state_dict().values())
        with torch.no_grad():
            module[0].bias[1] = 0
    assert weights_finite(module.state_dict().values())


def test_a_run_that_is_not_finite_stops_and_stays_stopped(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    """The rest of the budget is not spent, nothing is released, and no checkpoint is broken."""
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", 8, learning_rate=1e30, steps=40, checkpoint_every=3)
    with pytest.raises(RunError, match=r"after step 1 of the phase 'context'.*much lower learning rate, --lr"):
        take(training)
    run = training.run
    assert not run.complete
    assert not run.weights("context").exists()
    assert charged_steps(Ledger(run.ledger_path)) == 3
    assert stopped_because(run.private).code == "weights-not-finite"
    assert (run.private / "stopped.json").stat().st_mode & 0o777 == 0o600
    for checkpoint in run.private.glob("checkpoint*"):
        assert all(torch.isfinite(t).all() for t in load_file(checkpoint).values())
    # It would do the same again, so it does not even begin.
    monkeypatch.setattr(PublicStep, "__call__", None)
    monkeypatch.setattr(PrivateStep, "__call__", None)
    before = run.ledger_path.read_bytes()
    with pytest.raises(RunError, match="training was stopped"):
        take(Training(Run(run.path), training.config, load_images(tiny_images()), training.plan))
    assert run.ledger_path.read_bytes() == before


def test_the_last_finite_checkpoint_stays(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    whole = PrivateStep.__call__

    def breaks_at_five(self, denoiser, optimizer, step):
        values = whole(self, denoiser, optimizer, step)
        if step == 4:
            with torch.no_grad():
                next(denoiser.parameters()).view(-1)[0] = float("nan")
        return values

    monkeypatch.setattr(PrivateStep, "__call__", breaks_at_five)
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", steps=8, checkpoint_every=1)
    with pytest.raises(RunError, match="after step 5"):
        take(training)
    stored = load_file(training.run.private / "checkpoint.safetensors")
    assert all(torch.isfinite(t).all() for t in stored.values())
    steps = [v["step"] for v in training.private_log.read()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_network_that_answers_nothing_is_not_released(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    """Finite weights that multiply to infinity: found before the release, whichever step it comes after."""
    import dpsyngen.training.health as finite

    training = begin(tiny_settings, tiny_images(), tmp_path / "r", steps=5, checkpoint_every=100)
    done = set()
    monkeypatch.setattr(finite, "answers_finite", lambda denoiser, shape: ("context", 4) not in done)

    def to_the_end() -> None:
        for progress in training.steps():
            done.add((progress.phase, progress.step))

    with pytest.raises(RunError, match=r"after step 5 .* too large to compute with"):
        to_the_end()
    assert not training.run.complete
    assert not training.run.weights("context").exists()


def test_answers_finite(tiny_settings, tiny_images, tmp_path) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r")
    denoiser = training._denoiser(conditional=True, index=0)
    assert answers_finite(denoiser, (1, 8, 8))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.fill_(1e18)
    assert not answers_finite(denoiser, (1, 8, 8))


def test_a_public_phase_that_is_not_finite_costs_nothing(tmp_path, tiny_settings, tiny_images) -> None:
    values = {k: dict(v) for k, v in tiny_settings.items()}
    values["privacy"] = {"epsilon": np.inf, "insecure_seed": 7}
    config = load_config(values)
    config = config.model_copy(update={"public": config.public.model_copy(update={"learning_rate": 1e30})})
    training = start(config, load_images(tiny_images()), tmp_path / "r")
    with pytest.raises(RunError, match=r"public\.learning_rate"):
        take(training)
    assert charged_steps(Ledger(training.run.ledger_path)) == 0
    assert not list((training.run.release / "weights").iterdir())
    assert json.loads((training.run.private / "stopped.json").read_text())["basis"] == "released"
