"""What the studio says about ε, and what it shows of training images."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import BudgetExceeded, ConfigError, DataError
from dpsyngen.evaluation.run import generated_beside_real
from dpsyngen.experiments.cost import training_seconds
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.certificate import posterior, strength, suspicion
from dpsyngen.training.run import Run
from dpsyngen.training.session import planned
from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("prior", [0.5, 0.01, 0.9])
def test_the_posterior_is_that_of_the_mechanism_that_reveals_most(epsilon: float, delta: float, prior: float) -> None:
    # With probability δ the truth, else an answer that is e^ε times as likely right as wrong: by Bayes.
    right = (1 - delta) / (1 + math.exp(-epsilon))
    wrong = (1 - delta) / (1 + math.exp(epsilon))
    believes = right * prior / (right * prior + wrong * (1 - prior))
    assert posterior(epsilon, delta, prior) == pytest.approx(delta + (1 - delta) * believes, rel=1e-9)
    assert prior < posterior(epsilon, delta, prior) < 1


def test_the_posterior_has_its_ends() -> None:
    assert posterior(0.0, 0.0, 0.3) == pytest.approx(0.3)
    assert posterior(1e6, 0.0, 0.01) == pytest.approx(1.0)
    assert f"{100 * posterior(2.0, 1e-5, 0.5):.1f} %" in strength(2.0, 1e-5)


def test_suspicion_in_words() -> None:
    (coin, text), (hunch, _) = suspicion(3.0, 1e-5)
    assert coin == "50 % → at most 95.3 %"
    assert hunch == "1 % → at most 16.9 %"
    assert suspicion(1.0, 1e-5)[0][0] == "50 % → at most 73.2 %"  # 73.1061
    assert suspicion(6.95, 0.0)[0][0] == "50 % → practically 100 %"  # 99.904, which is no "100.0 %"
    assert "an image was used" in text
    assert "7 at most" in suspicion(3.0, 1e-5, 7)[0][1]
    assert "that images of a person were used" in suspicion(3.0, 1e-5, 1, by_person=True)[0][1]
    assert suspicion(20.0, 1e-5)[0][0] == "50 % → practically 100 %"


def test_training_images_beside_generated_ones_are_noted_in_the_ledger(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "r")
    run = Run(tmp_path / "r")
    before = run.finished_ledger()
    rows = generated_beside_real(run, each=4, classes=2)
    assert [name for name, _, _ in rows] == ["0", "1"]
    images, labels = tiny_arrays()
    for number, (_, generated, real) in enumerate(rows):
        assert generated.shape == real.shape == (4, 1, 8, 8)
        mine = images[labels == number]
        assert all(any(np.array_equal(one[0], other) for other in mine) for one in real)
    after = run.finished_ledger()
    assert len(after.entries) == len(before.entries) + 1
    assert "looked at beside generated ones" in after.entries[-1].reason
    assert after.epsilon() == before.epsilon()


def test_others_are_not_shown_as_training_images(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "r")
    other, labels = tiny_arrays(seed=1)
    np.savez(tmp_path / "other.npz", images=other, labels=labels)
    path = tmp_path / "r/private/config.yaml"
    text = path.read_text(encoding="utf-8").replace(str(finished.path.parent / "d.npz"), str(tmp_path / "other.npz"))
    path.write_text(text, encoding="utf-8")
    lines = len(Run(tmp_path / "r").finished_ledger().entries)
    with pytest.raises(DataError, match="not those that"):
        generated_beside_real(Run(tmp_path / "r"))
    assert len(Run(tmp_path / "r").finished_ledger().entries) == lines


@pytest.mark.slow
def test_what_a_plan_refuses_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    dataset = load_images(tiny_arrays())
    with pytest.raises(ConfigError, match="must be below 1/records"):
        planned(load_config({**TINY_SETTINGS, "privacy": {"epsilon": 4.0, "delta": 0.5}}), dataset)
    Budget.create(tmp_path / "b", epsilon_limit=0.1, delta=1e-3)
    given = {"epsilon": 4.0, "delta": 1e-3, "budget": str(tmp_path / "b")}
    with pytest.raises(BudgetExceeded):
        planned(load_config({**TINY_SETTINGS, "privacy": given}), dataset)
    config, plan = planned(load_config({**TINY_SETTINGS, "privacy": {"epsilon": 4.0, "delta": 1e-3}}), dataset)
    assert plan.steps == 6
    assert 0 < training_seconds(config, plan.shape) < 60
