"""Runs that were trained by code with a bug, against their own books; the replay itself runs on the code as it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dpsyngen.training.private as private
from dpsyngen.audit.report import decide
from dpsyngen.audit.run import replay
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.private import PrivateStep
from dpsyngen.training.run import Run
from tests.training.short_runs import start

pytestmark = pytest.mark.slow

KEY = "each batch is the Poisson sample that the run's key gives"
LOGGED = "steps logged are the steps charged"


def train(
    folder: Path, settings: dict, images, epsilon: float = 8.0, variant: str = "dpdm", **private_settings: int
) -> Run:
    config = load_config(
        {
            **settings,
            "privacy": {"epsilon": epsilon},
            "stages": {"variant": variant, "tau_coarse": 1.0},
            "private": {**settings["private"], "copies": 1, **private_settings},
        }
    )
    training = start(config, load_images(images), folder)
    for _ in training.steps():
        pass
    return training.run


def failed(run: Run) -> set[str]:
    return {f.name for f in decide(replay(run), 1e-6) if not f.passed}


def test_honest_run_without_privacy_passes(tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), math.inf)
    assert failed(run) == set()
    assert len(replay(run)) == 6


def test_honest_run_passes_until_its_books_are_changed(tmp_path, tiny_settings, tiny_images) -> None:
    """The rate is that of the declared number of records, the batches are drawn from those present."""
    run = train(tmp_path / "r", {**tiny_settings, "data": {"records": 90}}, tiny_images())
    assert failed(run) == set()
    assert len(replay(run)) == 6
    path = run.private / "training.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert failed(run) == {LOGGED}
    extra = json.loads(lines[-1]) | {"step": 7}
    path.write_text("".join(lines) + json.dumps(extra) + "\n")
    assert LOGGED in failed(run)
    path.write_text("")
    assert failed(run) == {LOGGED}
    run.data_path.unlink()
    with pytest.raises(RunError, match=r"data\.json"):
        replay(run)


@pytest.mark.parametrize(("variant", "checks", "epsilon"), [("gaussian", 1, math.inf), ("residual", 7, 8.0)])
def test_honest_run_with_moments_passes(variant, checks, epsilon, tmp_path, tiny_settings, tiny_images) -> None:
    run = train(tmp_path / "r", tiny_settings, tiny_images(), epsilon, variant=variant)
    assert failed(run) == set()
    assert len(replay(run)) == checks


@pytest.mark.parametrize("edit", ["noise", "left out", "twice"])
def test_moments_that_were_charged_otherwise_than_planned(
    edit, tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    import dpsyngen.training.moments as phase

    real = phase.queries

    def bad(plan, shape):
        first, *rest = real(plan, shape)
        if edit == "left out":
            return rest
        if edit == "twice":
            return [first, first, *rest]
        text, m, bound = first
        return [(text, replace(m, noise_multiplier=1.1 * m.noise_multiplier), bound), *rest]

    monkeypatch.setattr(phase, "queries", bad)
    monkeypatch.setattr(Ledger, "require", lambda self, *mechanisms: None)
    run = train(tmp_path / "r", tiny_settings, tiny_images(), variant="gaussian")
    assert failed(run) == {"DP moments are charged once each, at the noise that was planned"}


def test_shuffled_batches(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    def shuffled(randomness, step, records, rate):
        size = int(records * rate)
        order = np.random.default_rng(step * size // records).permutation(records)
        return np.sort(order[step * size % records :][:size])

    with monkeypatch.context() as patch:
        patch.setattr(private, "poisson_sample", shuffled)
        run = train(tmp_path / "r", tiny_settings, tiny_images(), steps=20, checkpoint_every=10)
    assert {KEY, "batch sizes vary as Poisson sampling says"} <= failed(run)


def test_wrong_rate(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    real = private.poisson_sample
    with monkeypatch.context() as patch:
        patch.setattr(private, "poisson_sample", lambda r, step, n, q: real(r, step, n, 2.5 * q))
        run = train(tmp_path / "r", tiny_settings, tiny_images(), steps=10)
    assert {KEY, "records are included at the claimed rate"} <= failed(run)


def test_empty_batches_drawn_again(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    real = private.poisson_sample

    def never_empty(randomness, step, records, rate):
        chosen = real(randomness, step, records, rate)
        return chosen if len(chosen) else np.arange(1)

    with monkeypatch.context() as patch:
        patch.setattr(private, "poisson_sample", never_empty)
        run = train(tmp_path / "r", tiny_settings, tiny_images(), steps=40, batch=1, checkpoint_every=40)
    assert {KEY, "empty batches occur and are steps"} <= failed(run)


def test_one_seed_for_several_steps(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    real = private.poisson_sample
    with monkeypatch.context() as patch:
        patch.setattr(private, "poisson_sample", lambda r, step, n, q: real(r, step % 3, n, q))
        run = train(tmp_path / "r", tiny_settings, tiny_images(), steps=20, checkpoint_every=10)
    assert KEY in failed(run)


def test_empty_batches_skipped(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    """The loop counts a step that is not taken; its log says that the batch was empty, as it was: see the transcript.

    A loop that goes on to the next number of step instead leaves a gap in the log.
    """
    real = PrivateStep.__call__
    skipped: list[int] = []

    def call(self, denoiser, optimizer, step):
        while not len(private.poisson_sample(self.randomness, step + len(skipped), len(self.dataset), 1 / 60)):
            skipped.append(step)
        return real(self, denoiser, optimizer, step + len(skipped))

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStep, "__call__", call)
        run = train(tmp_path / "r", tiny_settings, tiny_images(), steps=40, batch=1, checkpoint_every=40)
    assert skipped
    assert {KEY, "empty batches occur and are steps"} <= failed(run)
