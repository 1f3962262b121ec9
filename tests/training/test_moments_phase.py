"""DP moments in a run: charged before they are used, charged once, the same after any interruption."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dpsyngen import Generator
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.diffusion.stages import GAUSSIAN
from dpsyngen.errors import BudgetExceeded, RunError
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training import pipeline
from dpsyngen.training.log import Event, Note, Step
from dpsyngen.training.moments import MOMENTS, charged_moments, load_gaussian, queries
from dpsyngen.training.pipeline import Training
from dpsyngen.training.private import charged_steps
from dpsyngen.training.run import Run
from tests.training.short_runs import begin, bytes_of, finish, merged, resume, start


def begun(settings: dict, data, out: Path, variant: str, **sections: dict) -> Training:
    return begin(settings, data, out, **{"stages": {"variant": variant, "tau_coarse": 1.0}, **sections})


def again(path: Path, data) -> Training:
    return resume(Run(path), load_images(data))


# ------------------------------------------------------------------------------------------------- charging


@pytest.mark.parametrize("variant", ["gaussian", "residual"])
def test_no_image_is_summed_before_all_its_queries_are_in_the_ledger(
    variant, tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", variant)
    assert charged_moments(Ledger(training.run.ledger_path)) == []
    real, seen = pipeline.estimate_moments, []

    def looked(*args, **kwargs):
        seen.append(charged_moments(Ledger(training.run.ledger_path)))
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "estimate_moments", looked)
    finish(training)
    assert training.plan.moments is not None
    assert seen == [list(training.plan.moments.mechanisms())]


def test_nothing_is_summed_if_the_charge_fails(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual")
    monkeypatch.setattr(pipeline, "estimate_moments", lambda *a, **k: pytest.fail("images were read"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "charge", full)
    with pytest.raises(OSError, match="No space"):
        finish(training)


@pytest.mark.parametrize(("variant", "classes"), [("gaussian", True), ("residual", True), ("residual", False)])
def test_the_ledger_holds_what_was_done_and_no_more_than_the_target(
    variant, classes, tmp_path, tiny_settings, tiny_images
) -> None:
    data = tiny_images() if classes else (tiny_images()[0], None)
    training = finish(begun(tiny_settings, data, tmp_path / "r", variant))
    ledger = Ledger(training.run.ledger_path)
    plan = training.plan
    assert plan.moments is not None
    assert charged_moments(ledger) == list(plan.moments.mechanisms())
    assert len(charged_moments(ledger)) == (3 if classes else 2)
    assert charged_steps(ledger) == (0 if variant == "gaussian" else 6)
    assert ledger.epsilon() == epsilon(plan.mechanisms, ledger.delta) <= 8
    less = [replace(m, noise_multiplier=0.99 * m.noise_multiplier) for m in ledger.mechanisms]
    assert epsilon(less, ledger.delta) > 8
    # Steps do not come at the price of a run without moments.
    if variant == "residual":
        assert (
            plan.mechanism.noise_multiplier
            > begun(tiny_settings, data, tmp_path / "d", "dpdm").plan.mechanism.noise_multiplier
        )
        log = training.private_log.read()
        assert log[-1]["epsilon"] == pytest.approx(ledger.epsilon())
        assert log[0]["epsilon"] > epsilon(plan.moments.mechanisms(), ledger.delta)


def test_the_ledger_states_the_sensitivity_that_the_noise_is_made_for(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    from dpsyngen.training import moments

    real, made = moments.released, []

    def release(total, z, randomness, step):
        made.append((total.l2_sensitivity, z))
        return real(total, z, randomness, step)

    monkeypatch.setattr(moments, "released", release)
    training = finish(begun(tiny_settings, tiny_images(), tmp_path / "r", "gaussian"))
    entries = [e for e in Ledger(training.run.ledger_path).entries if e.details.get("query") == MOMENTS]
    assert [e.mechanism.noise_multiplier for e in entries if e.mechanism] == [z for _, z in made]
    for entry, (sensitivity, _) in zip(entries[:2], made[:2], strict=True):
        assert entry.details["l2_sensitivity"] == pytest.approx(sensitivity, rel=1e-12)
    assert "l2_sensitivity" not in entries[2].details  # it depends on how many directions were found


def test_without_privacy_the_ledger_says_so(tmp_path, tiny_settings, tiny_images) -> None:
    training = finish(begun(tiny_settings, tiny_images(), tmp_path / "r", "gaussian", privacy={"epsilon": math.inf}))
    ledger = Ledger(training.run.ledger_path)
    assert ledger.non_private
    assert charged_moments(ledger) == [None] * 3
    assert math.isinf(ledger.epsilon())
    assert not json.loads((training.run.release / "generator.json").read_text())["private"]


def test_a_run_that_would_exceed_its_target_does_not_begin(tmp_path, tiny_settings, tiny_images) -> None:
    """Moments and steps are asked for together, before the first of either."""
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual")
    plan = training.plan
    # Steps that fit on their own.
    noise = begun(tiny_settings, tiny_images(), tmp_path / "d", "dpdm").plan.mechanism.noise_multiplier
    too_much = replace(plan, mechanism=replace(plan.mechanism, noise_multiplier=noise))
    with pytest.raises(BudgetExceeded, match="above the target"):
        Training(Run.create(tmp_path / "x", training.config), training.config, training.dataset, too_much)


# --------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("variant", ["gaussian", pytest.param("residual", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asked", [True, False])
def test_interrupted_run_gives_the_same_release(variant, asked, tmp_path, tiny_settings, tiny_images) -> None:
    """Stopped politely (`asked`) or killed after every progress that a run reports, before and after its moments."""
    data = tiny_images()
    tiny_settings["network"]["prior"] = "shipped"
    whole = finish(begun(tiny_settings, data, tmp_path / "whole", variant))
    expected = bytes_of(whole.run.release)
    training, lives = begun(tiny_settings, data, tmp_path / "pieces", variant), 0
    while not Run(tmp_path / "pieces").complete:
        for count, _ in enumerate(training.steps(), 1):
            if asked:
                training.stop_requested = True
            elif count == 1 + lives % 4:
                break
        if not Run(tmp_path / "pieces").complete:
            training = again(tmp_path / "pieces", data)
        lives += 1
        assert lives < 40
    assert lives > 1
    assert bytes_of(Run(tmp_path / "pieces").release) == expected
    ledger = Ledger(Run(tmp_path / "pieces").ledger_path)
    assert len(charged_moments(ledger)) == 3
    assert ledger.epsilon() == whole.ledger.epsilon()


@pytest.mark.parametrize("charged", [1, 2, 3])
def test_run_killed_between_charge_and_result_takes_the_same_moments_and_pays_once(
    charged, tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    """With real entropy: two copies of the dead run give the same moments."""

    class Killed(BaseException):
        pass

    config = load_config(
        merged(tiny_settings, privacy={"epsilon": 8}, stages={"variant": "gaussian"}),
    )
    data = load_images(tiny_images())
    training = start(config, data, tmp_path / "r")
    assert training.randomness.secure
    real = Ledger.charge

    def dies(self, *args, **details) -> None:
        if len(charged_moments(self)) == charged:
            raise Killed
        real(self, *args, **details)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "charge", dies)
        if charged == 3:
            patch.setattr(pipeline, "estimate_moments", lambda *a, **k: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            finish(training)
    assert len(charged_moments(Ledger(training.run.ledger_path))) == charged
    assert not training.run.weights(GAUSSIAN).exists()
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    a, b = (finish(resume(Run(tmp_path / p), data)) for p in ("r", "copy"))
    assert a.run.weights(GAUSSIAN).read_bytes() == b.run.weights(GAUSSIAN).read_bytes()
    assert charged_moments(Ledger(a.run.ledger_path)) == list(training.plan.moments.mechanisms())
    # Another run has noise of its own.
    other = finish(start(config, data, tmp_path / "other"))
    assert other.run.weights(GAUSSIAN).read_bytes() != a.run.weights(GAUSSIAN).read_bytes()


def test_asked_to_stop_while_images_are_read_it_writes_nothing(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    data = tiny_images()
    whole = finish(begun(tiny_settings, data, tmp_path / "whole", "gaussian"))
    training = begun(tiny_settings, data, tmp_path / "r", "gaussian")
    real = pipeline.estimate_moments

    def interrupted(*args, **kwargs):
        training.stop_requested = True
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "estimate_moments", interrupted)
    finish(training)
    assert not training.run.complete
    assert not training.run.weights(GAUSSIAN).exists()
    monkeypatch.setattr(pipeline, "estimate_moments", real)
    resumed = finish(again(tmp_path / "r", data))
    assert resumed.run.weights(GAUSSIAN).read_bytes() == whole.run.weights(GAUSSIAN).read_bytes()
    assert len(charged_moments(Ledger(resumed.run.ledger_path))) == 3


@pytest.mark.parametrize("name", ["share: 0.5", "rank: 100"])
def test_changed_settings_of_moments_are_refused_on_resume(name, tmp_path, tiny_settings, tiny_images) -> None:
    section = {"moments": {"share": 0.5, "rank": 100}}
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual", **section)
    for progress in training.steps():
        if progress.phase == "moments":
            break
    path = training.run.private / "config.yaml"
    assert name in path.read_text()
    path.write_text(path.read_text().replace(name, f"{name.split(':')[0]}: {'0.3' if 'share' in name else '7'}"))
    with pytest.raises(RunError, match=r"was changed since the run was started \(moments\."):
        again(tmp_path / "r", tiny_images())


def test_noise_that_was_fixed_at_the_start_is_taken_after_a_resume(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    """Another version of the accountant could calibrate it differently in the last digits."""
    from dpsyngen.training import plan as plan_module

    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual")
    planned = training.plan
    del training
    real = plan_module.calibrate_noise
    monkeypatch.setattr(plan_module, "calibrate_noise", lambda *a, **k: real(*a, **k) * (1 + 1e-9))
    resumed = again(tmp_path / "r", tiny_images())
    assert resumed.plan.moments == planned.moments
    assert resumed.plan.mechanism == planned.mechanism
    assert finish(resumed).run.complete


def test_moments_of_other_noise_in_the_ledger_are_refused(tmp_path, tiny_settings, tiny_images) -> None:
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual")
    plan = training.plan
    assert plan.moments is not None
    text, mechanism, _ = queries(plan.moments, plan.shape)[0]
    training.ledger.charge(replace(mechanism, noise_multiplier=2 * mechanism.noise_multiplier), text, query=MOMENTS)
    with pytest.raises(RunError, match="another noise"):
        finish(training)
    assert not training.run.weights(GAUSSIAN).exists()


def test_damaged_moments_are_named_and_can_be_taken_again(tmp_path, tiny_settings, tiny_images) -> None:
    data = tiny_images()
    training = begun(tiny_settings, data, tmp_path / "r", "residual")
    for progress in training.steps():
        if progress.phase == "context":
            break
    path = training.run.weights(GAUSSIAN)
    good = path.read_bytes()
    path.write_bytes(good[:-8])
    with pytest.raises(RunError, match="Remove it and resume"):
        finish(again(tmp_path / "r", data))
    path.unlink()
    assert finish(again(tmp_path / "r", data)).run.weights(GAUSSIAN).read_bytes() == good
    assert len(charged_moments(Ledger(training.run.ledger_path))) == 3


# ------------------------------------------------------------------------------------ what comes out of the run


def test_budget_is_charged_with_moments_and_steps_together(tmp_path, tiny_settings, tiny_images) -> None:
    data = tiny_images()
    budget = tmp_path / "b"
    Budget.create(budget, epsilon_limit=8.5, delta=1e-2)
    section = {"privacy": {"epsilon": 8, "insecure_seed": None, "budget": str(budget)}}
    training = begun(tiny_settings, data, tmp_path / "r", "residual", **section)
    reserved = Budget(budget).mechanisms()
    assert set(reserved) >= {training.plan.mechanism.mechanism(6)}
    for progress in training.steps():
        if progress.phase == "context":
            break
    del training  # killed
    resumed = finish(again(tmp_path / "r", data))
    assert Budget(budget).mechanisms() == reserved
    assert Budget(budget).epsilon() == pytest.approx(resumed.ledger.epsilon())
    assert len(Budget(budget).charges) == 1


@pytest.mark.parametrize(
    ("variant", "prior", "classes", "channels"),
    [("gaussian", None, 3, 3), ("residual", None, 0, 1), ("residual", "shipped", 3, 3)],
)
def test_a_release_draws_what_the_run_learned(variant, prior, classes, channels, tmp_path, tiny_settings) -> None:
    tiny_settings["network"]["prior"] = prior
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3) if channels == 3 else (60, 8, 8), dtype=np.uint8)
    data = (images, np.arange(60) % classes if classes else None)
    run = finish(begun(tiny_settings, data, tmp_path / "r", variant)).run
    about = json.loads((run.release / "generator.json").read_text())
    moments = load_file(run.weights(GAUSSIAN))
    assert about["moments"] == {"rank": moments["basis"].shape[1]}
    assert moments["means"].shape == (max(classes, 1), 64 * channels)
    copy = tmp_path / "copy"
    shutil.copytree(run.release, copy)
    generator = Generator(copy)
    assert (generator.gaussian is None) is False
    drawn = [generator.sample(7, seed=1, batch_size=n) for n in (7, 2)]
    assert drawn[0].images.shape == (7, channels, 8, 8)
    assert np.abs(drawn[0].images.astype(int) - drawn[1].images).max() <= 1
    assert not np.array_equal(drawn[0].images, generator.sample(7, seed=2).images)
    for options in ({"sampler": "heun", "steps": 2, "churn": 1.0}, {"sampler": "ddim", "steps": 5}, {"guidance": 1.0}):
        assert generator.sample(3, **options).images.std() > 0
    way = generator.trajectory(3, 4)
    assert len(way.stages) == len(way.sigmas) == (1 if variant == "gaussian" else 3)
    assert {s.name for s in way.stages} <= {"gaussian", "context", "cleaning"}


def test_no_network_is_needed_where_the_moments_are_all(tmp_path, tiny_settings) -> None:
    """Images of a size that no network takes."""
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 9), dtype=np.uint8)
    training = finish(begun(tiny_settings, (images, None), tmp_path / "r", "gaussian"))
    assert training.parameters == 0
    assert not (training.run.private / "training.jsonl").exists()
    assert Generator(training.run.release).sample(2).images.shape == (2, 1, 9, 9)
    assert [p.name for p in (training.run.release / "weights").iterdir()] == ["gaussian.safetensors"]


def test_the_phase_says_when_it_begins_and_when_it_is_done(tmp_path, tiny_settings, tiny_images) -> None:
    told: list[Event] = []
    training = begun(tiny_settings, tiny_images(), tmp_path / "r", "residual", on_event=told.append)
    done = Step("moments", 3, 3, {}, private=True)
    assert [p for p in training.steps() if p.phase == "moments"] == [done]
    assert told[:2] == [Note("moments: reading the private images, 3 times"), done]
    with pytest.raises(RunError, match="damaged"):
        load_gaussian(training.run.weights("context"), training.plan.shape)
