"""Known ways to lose privacy, injected into the real training code: each is caught, and the code as it is passes.

The table in docs/audit.md is this file's; ``test_the_table_in_the_documentation_names_every_bug`` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dpsyngen.audit.canaries as canaries
import dpsyngen.privacy.noise as noise
import dpsyngen.privacy.per_example as per_example
import dpsyngen.training.private as private
from dpsyngen.audit.canaries import CanaryPlan, train_canaries
from dpsyngen.audit.report import Finding, decide
from dpsyngen.audit.sensitivity import audit_clipping, audit_noise
from dpsyngen.config import Config, load_config
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.plan import Shape
from dpsyngen.training.private import DpSgd, PrivateStep

ERROR = 1e-6  # chance that one of these tests fails although nothing is wrong: the noise is real
DENSE = CanaryPlan(120, 16, 68, 14, lookup=True, crash_after=6)
SPARSE = CanaryPlan(24, 16, 1, 40, lookup=True)


@pytest.fixture
def config() -> Config:
    return load_config(
        {"privacy": {"epsilon": 8.0}, "network": {"size": "nano"}, "private": {"copies": 2, "physical_batch": 16}}
    )


# ------------------------------------------------------------------------------------------------ the audits


def training(config: Config, folder: Path, plan: CanaryPlan) -> list[Finding]:
    findings, _ = train_canaries(config, plan, folder / "run", confidence=0.99)
    return decide(findings, ERROR)


def mechanism(config: Config) -> DpSgd:
    return DpSgd(100, 0.9, config.privacy.clipping_norm, config.private.model_copy(update={"batch": 20}))


def step(config: Config, folder: Path, trials: int = 20_000) -> list[Finding]:
    game = audit_noise(config, mechanism(config), trials=trials, confidence=0.999)
    return decide([game.finding], ERROR)


def short_step(config: Config, folder: Path) -> list[Finding]:
    return step(config, folder, 4000)


def clipping(config: Config, folder: Path) -> list[Finding]:
    return audit_clipping(config, mechanism(config), Shape(8, 1, ("a", "b"), 100))


def dense(config: Config, folder: Path) -> list[Finding]:
    return training(config, folder, DENSE)


def sparse(config: Config, folder: Path) -> list[Finding]:
    return training(config, folder, SPARSE)


def network(config: Config, folder: Path) -> list[Finding]:
    return training(config, folder, CanaryPlan(8, 8, 8, 6, crash_after=6))


# ------------------------------------------------------------------------------------------------- the bugs

Patch = pytest.MonkeyPatch


def _with_release(patch: Patch, change: Callable[..., dict]) -> None:
    """`change` gets the clipped sum and the constants of noisy_mean, and returns what to change of them."""
    real = noise.noisy_mean
    patch.setattr(noise, "noisy_mean", lambda total, **k: real(total, **(k | change(total, **k))))


def noise_scaled_by_batch(patch: Patch) -> None:
    """The noise is divided by the batch once more than the sum is."""
    _with_release(patch, lambda total, **k: {"noise_multiplier": k["noise_multiplier"] / k["expected_examples"]})


def half_the_noise(patch: Patch) -> None:
    _with_release(patch, lambda total, **k: {"noise_multiplier": k["noise_multiplier"] / 2})


def tenth_less_noise(patch: Patch) -> None:
    _with_release(patch, lambda total, **k: {"noise_multiplier": k["noise_multiplier"] * 0.9})


def divided_by_realised_batch(patch: Patch) -> None:
    _with_release(patch, lambda total, **k: {"expected_examples": max(total.examples, 1)})


def one_layer_unclipped(patch: Patch) -> None:
    real = per_example.clip

    def clip(contributions, *rest, **options):
        out = real(contributions, *rest, **options)
        whole = contributions[4].weighted_sum(torch.ones(len(out.norms)))
        return replace(out, sums=[whole if i == 4 else s for i, s in enumerate(out.sums)])

    patch.setattr(per_example, "clip", clip)


def _clip_each_copy(patch: Patch, averaged: bool) -> None:
    real = per_example.PerExampleGradients.__call__

    def call(self, loss, examples, copies=1, **options):
        if examples == 0:
            return real(self, loss, 0)
        out = real(self, loss, examples * copies)
        return replace(out, examples=examples, sums=[s / copies if averaged else s for s in out.sums])

    patch.setattr(per_example.PerExampleGradients, "__call__", call)


def copies_averaged_after_clipping(patch: Patch) -> None:
    _clip_each_copy(patch, averaged=True)


def copies_summed_after_clipping(patch: Patch) -> None:
    _clip_each_copy(patch, averaged=False)


def _resumed(patch: Patch) -> list[bool]:
    """A list that is no longer empty once the run has been resumed."""
    flag: list[bool] = []
    real = canaries.Training.resume

    def resume(*arguments, **named):
        flag.append(True)
        return real(*arguments, **named)

    patch.setattr(canaries.Training, "resume", resume)
    return flag


def fresh_noise_for_repeated_steps(patch: Patch) -> None:
    """After a crash the seed is new, so that the average of two attempts has less noise."""
    flag, other = _resumed(patch), Randomness.from_system()
    _with_release(patch, lambda total, **k: {"randomness": other} if flag else {})


def noise_restarts_on_resume(patch: Patch) -> None:
    """After a crash the noise starts again with that of step 0: sums that share it can be subtracted."""
    flag = _resumed(patch)
    _with_release(patch, lambda total, **k: {"step": k["step"] - 4} if flag else {})


def sample_restarts_on_resume(patch: Patch) -> None:
    flag, real = _resumed(patch), private.poisson_sample
    patch.setattr(private, "poisson_sample", lambda r, step, n, q: real(r, step - 4 if flag else step, n, q))


def shuffling(patch: Patch) -> None:
    """Batches of equal size out of a new order each epoch."""

    def shuffled(randomness, step, records, rate):
        size = max(1, int(records * rate))
        epoch, place = divmod(step, records // size)
        order = np.random.default_rng(randomness.seed("sampling", epoch)).permutation(records)
        return np.sort(order[place * size : (place + 1) * size])

    patch.setattr(private, "poisson_sample", shuffled)


def wrong_rate(patch: Patch) -> None:
    real = private.poisson_sample
    patch.setattr(private, "poisson_sample", lambda r, step, n, q: real(r, step, n, q * 1.3))


def empty_batches_drawn_again(patch: Patch) -> None:
    real = private.poisson_sample

    def sample(randomness, step, records, rate):
        chosen = real(randomness, step, records, rate)
        while not len(chosen):
            step += 1000
            chosen = real(randomness, step, records, rate)
        return chosen

    patch.setattr(private, "poisson_sample", sample)


def empty_batches_skipped(patch: Patch) -> None:
    real = PrivateStep.__call__

    def call(self, denoiser, optimizer, step):
        chosen = private.poisson_sample(self.randomness, step, len(self.dataset), self.dp.sampling_rate)
        return real(self, denoiser, optimizer, step) if len(chosen) else {"loss": 0.0, "examples": 0}

    patch.setattr(PrivateStep, "__call__", call)


def one_step_more(patch: Patch) -> None:
    """After the last step, one that nobody counts."""
    real = PrivateStep.__call__

    def call(self, denoiser, optimizer, step):
        out = real(self, denoiser, optimizer, step)
        if step == self.dp.config.steps - 1:
            real(self, denoiser, optimizer, step + 1)
        return out

    patch.setattr(PrivateStep, "__call__", call)


def charged_afterwards(patch: Patch) -> None:
    real = private.charge_ahead
    patch.setattr(private, "charge_ahead", lambda ledger, m, step: real(ledger, m, step - 1) if step else None)


def noise_missing_in_one_layer(patch: Patch) -> None:
    real = noise.noisy_mean

    def noisy(total, **k):
        out = real(total, **k)
        return [total.sums[0] / k["expected_examples"], *out[1:]]

    patch.setattr(noise, "noisy_mean", noisy)


def noise_of_one_key_for_all(patch: Patch) -> None:
    """Each step has the noise of the first."""
    _with_release(patch, lambda total, **k: {"step": 0})


def other_noise_charged(patch: Patch) -> None:
    """The ledger is told of more noise than there is."""
    real = private.DpSgd.mechanism
    patch.setattr(
        private.DpSgd,
        "mechanism",
        lambda self, steps: replace(real(self, steps), noise_multiplier=1.1 * self.noise_multiplier),
    )


@dataclass(frozen=True)
class Bug:
    inject: Callable[[Patch], None]
    audit: Callable[[Config, Path], list[Finding]]
    caught_by: str
    and_by: str = ""


SCALE, STEP = "noise has the claimed scale, overall", "a step hides a worst-case record"
MOVES, AVERAGE = "one record moves the clipped sum by at most C", "an example's gradient is averaged over its copies"
REPEAT, FRESH = "a step that is repeated after a crash is the same step", "noise of different steps is uncorrelated"
SIZES, EMPTY = "batch sizes vary as Poisson sampling says", "empty batches occur and are steps"
TAKEN, BEFORE = "steps taken are the steps charged", "each step is in the ledger before it is taken"
BUGS = [
    Bug(noise_scaled_by_batch, dense, SCALE),
    Bug(noise_scaled_by_batch, short_step, STEP),
    Bug(half_the_noise, dense, SCALE),
    Bug(half_the_noise, short_step, STEP),
    Bug(tenth_less_noise, step, STEP),
    Bug(tenth_less_noise, network, SCALE),
    Bug(noise_missing_in_one_layer, network, "noise has the claimed scale in every parameter"),
    Bug(noise_of_one_key_for_all, dense, FRESH),
    Bug(divided_by_realised_batch, network, "noise has the claimed scale in every step"),
    Bug(divided_by_realised_batch, dense, "the sum is divided by the constant expected batch"),
    Bug(one_layer_unclipped, clipping, MOVES),
    Bug(copies_summed_after_clipping, clipping, MOVES),
    Bug(copies_averaged_after_clipping, clipping, AVERAGE),
    Bug(fresh_noise_for_repeated_steps, dense, REPEAT),
    Bug(noise_restarts_on_resume, dense, FRESH, REPEAT),
    Bug(sample_restarts_on_resume, dense, "no batch repeats an earlier one"),
    Bug(shuffling, dense, "successive batches are independent", "how often a record is used varies as Poisson"),
    Bug(shuffling, sparse, SIZES),
    Bug(wrong_rate, dense, "records are included at the claimed rate"),
    Bug(empty_batches_drawn_again, sparse, EMPTY),
    Bug(empty_batches_skipped, sparse, TAKEN),
    Bug(one_step_more, dense, TAKEN),
    Bug(charged_afterwards, dense, BEFORE),
    Bug(other_noise_charged, dense, "the ledger charges the noise that is added"),
]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda b: f"{b.inject.__name__}-{b.audit.__name__}")
def test_bug_is_caught(bug: Bug, config, tmp_path, monkeypatch) -> None:
    bug.inject(monkeypatch)
    findings = bug.audit(config, tmp_path)
    failed = [f.name for f in findings if not f.passed]
    assert any(name.startswith(bug.caught_by) for name in failed), failed
    assert any(name.startswith(bug.and_by) for name in failed), failed


# Styles of clipping differ in what is clipped, kinds of noise in what is released.
@pytest.mark.parametrize(
    ("noise", "style", "audit"),
    [
        *(("gaussian", "flat", audit) for audit in (short_step, clipping, dense, sparse, network)),
        *(("discrete", "flat", audit) for audit in (short_step, clipping, dense, network)),
        *(("gaussian", style, audit) for style in ("per-layer", "automatic") for audit in (short_step, clipping)),
    ],
)
def test_the_code_as_it_is_passes(noise, style, audit, config, tmp_path) -> None:
    config = config.model_copy(
        update={"private": config.private.model_copy(update={"noise": noise, "clipping": style})}
    )
    findings = audit(config, tmp_path)
    assert [f for f in findings if not f.passed] == []
    assert findings


def test_the_table_in_the_documentation_names_every_bug() -> None:
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    for bug in BUGS:
        row = [line for line in text.split("\n") if f"`{bug.inject.__name__}`" in line]
        assert any(bug.caught_by in line for line in row), (bug.inject.__name__, bug.caught_by)
        assert any(bug.and_by in line for line in row), (bug.inject.__name__, bug.and_by)
