"""Runs with DP moments: what they cost, that it is charged before and once, and that nothing is drawn twice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.torch import load_file

from dpsyngen.config import load_config, with_batch
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.generator import Generator
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training import moments_phase, pipeline
from dpsyngen.training.plan import Shape, make_plan
from dpsyngen.training.run import Run
from dpsyngen.training.start import resume
from tests.training.short_runs import begin, bytes_of, finish, merged

SHAPE = Shape(8, 1, ("a", "b", "c"), 600)


def plan_of(settings: dict, **sections: dict):
    given = merged(settings, privacy={"epsilon": 2.0, "delta": 1e-4}, **sections)
    return make_plan(load_config(given), SHAPE)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_moments_and_steps_cost_the_target_and_no_more(tiny_settings, share):
    plan = plan_of(tiny_settings, stages={"variant": "residual"}, moments={"share": share})
    assert plan.moments is not None
    assert len(plan.mechanisms) == 4
    alone = epsilon(plan.moments.mechanisms(), 1e-4)
    assert 0.98 * 2.0 * share <= alone <= 2.0 * share
    assert 0.98 * 2.0 <= epsilon(plan.mechanisms, 1e-4) <= 2.0


def test_a_gaussian_alone_spends_all_on_moments(tiny_settings):
    plan = plan_of(tiny_settings, stages={"variant": "gaussian"})
    assert plan.steps == 0
    assert len(plan.mechanisms) == 3
    assert 0.98 * 2.0 <= epsilon(plan.mechanisms, 1e-4) <= 2.0


def test_the_published_variants_release_no_moments(tiny_settings):
    plan = plan_of(tiny_settings)
    assert plan.moments is None
    assert len(plan.mechanisms) == 1


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"stages": {"variant": "residual", "networks": "shared"}}, "experts"),
        ({"stages": {"variant": "gaussian", "pretrain": True}}, "pre-trained"),
        ({"moments": {"share": 1.0}}, "moments.share"),
        ({"moments": {"share": 0.0}}, "moments.share"),
    ],
)
def test_what_cannot_be_is_refused(tiny_settings, sections, words):
    with pytest.raises(ConfigError, match=words):
        plan_of(tiny_settings, **sections)


def test_the_batch_by_rule():
    config = load_config({"private": {"batch": 0, "largest_batch": 500}}, preset="cpu-small")
    assert [with_batch(config, n).private.batch for n in (1, 30, 1500, 60_000)] == [1, 10, 500, 500]
    given = load_config({"private": {"batch": 7}}, preset="cpu-small")
    assert with_batch(given, 60_000).private.batch == 7


def test_moments_are_charged_before_they_are_taken(tiny_settings, tiny_images, tmp_path, monkeypatch):
    training = begin(tiny_settings, tiny_images(), tmp_path / "run", stages={"variant": "residual"})
    seen: list[int] = []
    real = moments_phase.estimate_moments

    def looked_at(*args, **kwargs):
        on_disk = Ledger(training.run.ledger_path)
        seen.append(sum(e.details.get("query") == moments_phase.QUERY for e in on_disk.entries))
        return real(*args, **kwargs)

    monkeypatch.setattr(moments_phase, "estimate_moments", looked_at)
    finish(training)
    assert seen == [3]
    ledger = Ledger(training.run.ledger_path)
    assert len(ledger.mechanisms) == 3 + 3  # and three blocks of two steps
    assert ledger.epsilon() <= 8


def test_a_run_killed_after_the_charge_takes_the_same_moments_and_pays_once(
    tiny_settings, tiny_images, tmp_path, monkeypatch
):
    whole = finish(begin(tiny_settings, tiny_images(), tmp_path / "whole", stages={"variant": "residual"}))
    training = begin(tiny_settings, tiny_images(), tmp_path / "killed", stages={"variant": "residual"})
    with monkeypatch.context() as m:
        m.setattr(pipeline, "release_moments", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(training)
    assert len(Ledger(training.run.ledger_path).mechanisms) == 3
    again = finish(resume(Run(tmp_path / "killed"), training.dataset))
    assert bytes_of(again.run.release / "weights") == bytes_of(whole.run.release / "weights")
    assert Ledger(again.run.ledger_path).mechanisms == Ledger(whole.run.ledger_path).mechanisms


def test_another_share_on_resume_is_refused(tiny_settings, tiny_images, tmp_path):
    training = begin(tiny_settings, tiny_images(), tmp_path / "run", stages={"variant": "residual"})
    with training.run.lock():
        next(iter(training._phases()))
    path = training.run.private / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("share: 0.5", "share: 0.9"), encoding="utf-8")
    with pytest.raises(RunError, match="changed"):
        resume(Run(tmp_path / "run"), training.dataset)


def test_noise_of_the_moments_differs_between_keys_and_reaches_the_release(tiny_settings, tiny_images, tmp_path):
    released = []
    for seed in (1, 2):
        training = begin(
            tiny_settings,
            tiny_images(),
            tmp_path / str(seed),
            stages={"variant": "gaussian"},
            privacy={"epsilon": 8, "insecure_seed": seed},
        )
        finish(training)
        released.append(load_file(training.run.weights("gaussian")))
    assert not np.allclose(released[0]["means"], released[1]["means"], atol=1e-3)


@pytest.mark.parametrize("variant", ["gaussian", "residual", "residual-cleaning"])
@pytest.mark.parametrize("epsilon", [8, math.inf])
def test_a_generator_draws_from_the_release_alone(tiny_settings, tiny_images, tmp_path, variant, epsilon):
    privacy = {"epsilon": epsilon, "insecure_seed": 7}
    training = finish(
        begin(tiny_settings, tiny_images(), tmp_path / "run", stages={"variant": variant}, privacy=privacy)
    )
    assert math.isinf(Ledger(training.run.ledger_path).epsilon()) == math.isinf(epsilon)
    training.run.release.rename(tmp_path / "copy")
    generator = Generator(tmp_path / "copy")
    drawn = generator.sample(6)
    assert drawn.images.shape == (6, 1, 8, 8)
    assert drawn.images.std() > 0
    assert np.array_equal(drawn.images, generator.sample(6).images)
    assert not np.array_equal(drawn.images, generator.sample(6, seed=1).images)
    assert len(np.concatenate(list(generator.stream(5, labels=None)))) == 5


def test_unlabelled_images(tiny_settings, tiny_images, tmp_path):
    images, _ = tiny_images()
    for variant in ("gaussian", "residual"):
        training = finish(begin(tiny_settings, (images, None), tmp_path / variant, stages={"variant": variant}))
        assert len([m for m in Ledger(training.run.ledger_path).mechanisms if m.sampling_rate == 1]) == 2
        assert Generator(training.run.release).sample(3).labels is None


def test_changed_moments_are_refused(tiny_settings, tiny_images, tmp_path):
    training = finish(begin(tiny_settings, tiny_images(), tmp_path / "run", stages={"variant": "gaussian"}))
    path = training.run.release / "generator.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about["moments"]["rank"] += 1
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        Generator(training.run.release)
    del about["moments"]
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(RunError, match="contradict"):
        Generator(training.run.release)


def test_a_budget_reserves_moments_and_steps(tiny_settings, tiny_images, tmp_path):
    budget = tmp_path / "b.budget"
    Budget.create(budget, epsilon_limit=8.5, delta=1e-3)
    privacy = {"epsilon": 8, "delta": 1e-3, "budget": str(budget), "insecure_seed": None}
    training = finish(
        begin(tiny_settings, tiny_images(), tmp_path / "run", stages={"variant": "residual"}, privacy=privacy)
    )
    (charge,) = Budget(budget).charges.values()
    assert len(charge.mechanisms) == 4
    assert Budget(budget).epsilon() == pytest.approx(Ledger(training.run.ledger_path).epsilon(), abs=1e-6)
