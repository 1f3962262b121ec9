"""Runs that are interrupted, and what may not be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpsyngen import Generator
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import BudgetExceeded, RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.private import charged_steps
from dpsyngen.training.run import Run
from tests.training.short_runs import begin, bytes_of, finish, merged, resume, start


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param({"variant": "both", "pretrain": True}, marks=pytest.mark.slow),
        {"variant": "coarse", "networks": "shared"},
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_interrupted_run_gives_the_same_weights(stages, asked, tmp_path, tiny_settings, tiny_images) -> None:
    """Stopped politely (`asked`) or killed, after every possible number of steps, and resumed."""
    data = tiny_images()
    whole = finish(begin(tiny_settings, data, tmp_path / "whole", stages=stages))
    expected = bytes_of(whole.run.release)
    total = len(whole.private_log.read()) + len(whole.public_log.read())
    assert total >= 6
    out = tmp_path / "pieces"
    training = begin(tiny_settings, data, out, stages=stages)
    for attempt in range(2 * total):
        for count, _ in enumerate(training.steps(), 1):
            if asked:
                training.stop_requested = True
            elif count == 5:
                break  # as if killed: whatever was not checkpointed is lost
        if Run(out).complete:
            break
        training = resume(Run(out), load_images(data))
        assert attempt < 2 * total - 1
    assert bytes_of(Run(out).release) == expected
    ledger = Ledger(Run(out).ledger_path)
    assert charged_steps(ledger) == tiny_settings["private"]["steps"]
    assert ledger.epsilon() == whole.ledger.epsilon()
    assert [v["loss"] for v in training.private_log.read()] == [v["loss"] for v in whole.private_log.read()]


def test_resume_repeats_steps_exactly_so_noise_is_never_fresh_for_charged_steps(
    tmp_path, tiny_settings, tiny_images
) -> None:
    """With real entropy: a step that is run twice gives the same weights both times."""
    config = load_config(merged(tiny_settings, privacy={"epsilon": 8}, stages={"variant": "dpdm"}))
    data = load_images(tiny_images())
    training = start(config, data, tmp_path / "r")
    assert training.randomness.secure
    steps = training.steps()
    next(steps)
    before = Ledger(training.run.ledger_path)
    assert charged_steps(before) == 2  # a block of checkpoint_every
    del steps  # killed before the first checkpoint
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "r", copy)
    a, b = (finish(resume(Run(p), data)) for p in (tmp_path / "r", copy))
    assert a.run.weights("context").read_bytes() == b.run.weights("context").read_bytes()
    assert charged_steps(a.ledger) == 6


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, tiny_settings, tiny_images) -> None:
    data = tiny_images()
    whole = finish(begin(tiny_settings, data, tmp_path / "whole", stages={"variant": "dpdm"}))
    training = begin(tiny_settings, data, tmp_path / "r", stages={"variant": "dpdm"})
    for p in training.steps():
        if p.step == 5:
            break
    assert training.checkpoints.newest.exists()
    assert training.checkpoints.older.exists()
    content = training.checkpoints.newest.read_bytes()
    training.checkpoints.newest.write_bytes(content[: len(content) // 2])
    again = finish(resume(Run(tmp_path / "r"), load_images(data)))
    assert again.checkpoints.damaged
    assert again.run.weights("context").read_bytes() == whole.run.weights("context").read_bytes()


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    import dpsyngen.training.checkpoint as checkpoint_module

    data = tiny_images()
    whole = finish(begin(tiny_settings, data, tmp_path / "whole", stages={"variant": "dpdm"}))
    training = begin(tiny_settings, data, tmp_path / "r", stages={"variant": "dpdm"})
    real = checkpoint_module.save_file

    def full(tensors, path, metadata):
        if training.ledger is not None and charged_steps(training.ledger) >= 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        finish(training)
    assert not [p for p in training.run.private.iterdir() if p.name.startswith(".checkpoint")]
    monkeypatch.setattr(checkpoint_module, "save_file", real)
    again = finish(resume(Run(tmp_path / "r"), load_images(data)))
    assert again.run.weights("context").read_bytes() == whole.run.weights("context").read_bytes()


def test_resume_refuses_other_images_and_finished_or_foreign_runs(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(0), tmp_path / "r", stages={"variant": "dpdm"})
    next(training.steps())
    with pytest.raises(RunError, match="images are not those"):
        resume(Run(tmp_path / "r"), load_images(tiny_images(1)))
    finish(resume(Run(tmp_path / "r"), load_images(tiny_images(0))))
    with pytest.raises(RunError, match="finished already"):
        resume(Run(tmp_path / "r"), load_images(tiny_images(0)))
    (tmp_path / "r" / "run.json").write_text('{"format": 99, "dpsyngen": "9.9"}')
    with pytest.raises(RunError, match="format 99"):
        Run(tmp_path / "r")
    with pytest.raises(RunError, match="no readable run"):
        Run(tmp_path)


@pytest.mark.parametrize("change", [("batch: 12", "batch: 24"), ("steps: 6", "steps: 40")])
def test_changed_settings_cannot_ride_on_steps_that_are_charged(change, tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    next(training.steps())  # two steps are charged, one is taken
    path = training.run.private / "config.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises((RunError, BudgetExceeded)):
        finish(resume(Run(tmp_path / "r"), load_images(tiny_images())))
    assert Ledger(training.run.ledger_path).epsilon() <= 8
    assert not training.run.complete


def test_generator_of_another_version_or_damaged(tmp_path, tiny_settings, tiny_images) -> None:
    run = finish(begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})).run
    path = run.release / "generator.json"
    good = path.read_text()
    for text, message in (
        (good.replace('"format": 1', '"format": 2'), "format 2"),
        ("[]", "format None"),
        ("{", "holds no generator"),
        (good.replace('"resolution": 8', '"resolution": "eight"'), "damaged"),
        (good.replace('"nano"', '"tiny"'), "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=message):
            Generator(run.release)
    path.write_text(good)
    weights = run.weights("context")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match="damaged"):
        Generator(run.release)


def test_lost_random_state_is_never_replaced(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    next(training.steps())
    training.run.randomness_path.unlink()
    with pytest.raises(RunError, match="would get fresh noise"):
        resume(Run(tmp_path / "r"), load_images(tiny_images()))


def test_one_process_at_a_time(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r")
    with training.run.lock(), pytest.raises(RunError, match="another process"), Run(tmp_path / "r").lock():
        pass
    with Run(tmp_path / "r").lock():
        pass
