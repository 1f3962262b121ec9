"""Whole runs in small: resume equality, the private/release split, stamps, refusals."""

from __future__ import annotations

import json
import math
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dpsyngen.training.private as private_module
from dpsyngen import api
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import BudgetExceeded, ConfigError, RunError
from dpsyngen.generator import Generator
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.pipeline import Training
from dpsyngen.training.private import charged_steps
from dpsyngen.training.run import JsonLines, Run
from dpsyngen.training.start import resume, start


def merged(settings: dict, **sections: dict) -> dict:
    out = {k: dict(v) for k, v in settings.items()}
    for name, values in sections.items():
        out[name] = {**out.get(name, {}), **values}
    return out


def begin(settings: dict, data, out: Path, **sections: dict) -> Training:
    config = load_config(merged(settings, **{"privacy": {"epsilon": 8, "insecure_seed": 7}, **sections}))
    return start(config, load_images(data), out)


def finish(training: Training) -> Training:
    for _ in training.steps():
        pass
    return training


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("stages", "networks"),
    [
        ({"variant": "dpdm"}, {"context"}),
        ({"variant": "finetune"}, {"pretrain", "context"}),
        ({"variant": "cleaning"}, {"cleaning", "context"}),
        ({"variant": "coarse"}, {"coarse", "context"}),
        ({"variant": "both"}, {"cleaning", "coarse", "context"}),
        ({"variant": "both", "pretrain": True}, {"pretrain", "cleaning", "coarse", "context"}),
        ({"variant": "both", "networks": "shared"}, {"shared"}),
        ({"variant": "cleaning", "networks": "shared", "pretrain": True}, {"pretrain", "shared"}),
    ],
)
def test_every_variant_trains_samples_and_states_its_epsilon(
    stages, networks, tmp_path, tiny_settings, tiny_images
) -> None:
    training = finish(begin(tiny_settings, tiny_images(), tmp_path / "r", stages=stages))
    run = training.run
    assert run.complete
    assert {p.stem for p in (run.release / "weights").iterdir()} == networks
    statement = json.loads((run.release / "privacy.json").read_text())
    assert statement["epsilon"] == Ledger(run.ledger_path).epsilon() <= 8
    assert charged_steps(Ledger(run.ledger_path)) == tiny_settings["private"]["steps"]
    # A copy of the release half is all that sampling needs.
    shutil.copytree(run.release, tmp_path / "copy")
    shutil.rmtree(run.path)
    samples = Generator(tmp_path / "copy").sample(5)
    assert samples.images.shape == (5, 1, 8, 8)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0, 1]


def test_shared_network_is_trained_by_both_kinds_of_steps(tmp_path, tiny_settings, tiny_images) -> None:
    with_public = finish(
        begin(tiny_settings, tiny_images(), tmp_path / "a", stages={"variant": "both", "networks": "shared"})
    )
    alone = finish(
        begin(
            merged(tiny_settings, public={"learning_rate": 1e-12}),
            tiny_images(),
            tmp_path / "b",
            stages={"variant": "both", "networks": "shared"},
        )
    )
    a, b = load_file(with_public.run.weights("shared")), load_file(alone.run.weights("shared"))
    assert any(not torch.allclose(a[k], b[k]) for k in a)


def test_public_experts_do_not_depend_on_the_private_images(tmp_path, tiny_settings, tiny_images) -> None:
    runs = [
        finish(
            begin(tiny_settings, tiny_images(seed), tmp_path / str(seed), stages={"variant": "both", "pretrain": True})
        )
        for seed in (1, 2)
    ]
    for network in ("pretrain", "cleaning", "coarse"):
        first, second = (r.run.weights(network).read_bytes() for r in runs)
        assert first == second
    assert runs[0].run.weights("context").read_bytes() != runs[1].run.weights("context").read_bytes()


# -------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stages", [{"variant": "both", "pretrain": True}, {"variant": "coarse", "networks": "shared"}])
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
    with pytest.raises(RunError, match="cannot be continued privately"):
        resume(Run(tmp_path / "r"), load_images(tiny_images()))


def test_one_process_at_a_time(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r")
    with training.run.lock(), pytest.raises(RunError, match="another process"), Run(tmp_path / "r").lock():
        pass
    with Run(tmp_path / "r").lock():
        pass


# ----------------------------------------------------------------------------------------- private / release


def test_without_the_patch_the_release_does_depend_on_the_data(tmp_path, tiny_settings, tiny_images) -> None:
    """The taint test of bundles (tests/report/test_bundle.py) can fail: the mechanism's real output differs."""
    releases = [
        bytes_of(
            finish(begin(tiny_settings, tiny_images(s), tmp_path / str(s), stages={"variant": "dpdm"})).run.release
        )
        for s in (1, 2)
    ]
    assert releases[0] != releases[1]


def test_files_of_the_release_are_those_we_know(tmp_path, tiny_settings, tiny_images) -> None:
    run = finish(begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "both"})).run
    api.write_report(run)
    assert set(bytes_of(run.release)) == {
        "PRIVACY.md",
        "config.yaml",
        "generator.json",
        "privacy.json",
        "public_training.jsonl",
        "report.html",
        "weights/cleaning.safetensors",
        "weights/coarse.safetensors",
        "weights/context.safetensors",
    }
    public = JsonLines(run.release / "public_training.jsonl", 0o644).read()
    assert {line["phase"] for line in public} == {"cleaning", "coarse"}


def test_file_modes(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    next(training.steps())
    next(training.steps())
    assert stat.S_IMODE(training.run.private.stat().st_mode) == 0o700
    for path in training.run.private.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# ---------------------------------------------------------------------------------------------------- stamps


def test_stamps_of_runs_without_privacy(tmp_path, tiny_settings, tiny_images) -> None:
    seeded = finish(begin(tiny_settings, tiny_images(), tmp_path / "seeded", stages={"variant": "dpdm"})).run
    open_run = finish(
        begin(
            tiny_settings,
            tiny_images(),
            tmp_path / "inf",
            stages={"variant": "dpdm"},
            privacy={"epsilon": math.inf},
        )
    ).run
    private = finish(
        begin(tiny_settings, tiny_images(), tmp_path / "p", stages={"variant": "dpdm"}, privacy={"epsilon": 8})
    ).run
    for run, is_private in ((seeded, False), (open_run, False), (private, True)):
        private_html, public_html = api.write_report(run)
        statement = json.loads((run.release / "privacy.json").read_text())
        assert statement["private"] is is_private
        for text in ((run.release / "PRIVACY.md").read_text(), public_html.read_text(), private_html.read_text()):
            assert ("NOT PRIVATE" in text) is (not is_private)
        assert Generator(run.release).private is is_private
    assert json.loads((open_run.release / "privacy.json").read_text())["epsilon"] == "inf"
    assert math.isinf(Ledger(open_run.ledger_path).epsilon())


def test_report_of_the_release_has_nothing_private_and_escapes_names(tmp_path, tiny_settings, tiny_images) -> None:
    images, labels = tiny_images()
    np.savez(
        tmp_path / "d.npz",
        images=images,
        labels=labels,
        class_names=np.array(["<script>alert(1)</script>", "b & c", "日本"]),
    )
    run = finish(begin(tiny_settings, tmp_path / "d.npz", tmp_path / "r")).run
    api.evaluate(run, data=tmp_path / "d.npz", images=30, classifiers=())
    private_html, public_html = api.write_report(run)
    public, private = public_html.read_text(), private_html.read_text()
    assert "<script>" not in public
    assert "&lt;script&gt;" in public
    assert "日本" in public
    assert "Fréchet" in private
    assert "Fréchet" not in public
    assert "evaluation against real images" in private
    assert "evaluation against real images" not in public
    assert "PRIVATE COPY" in private
    assert "PRIVATE COPY" not in public
    for text in (public, private):
        assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        )
        assert 'src="http' not in text
        assert "<link" not in text


# --------------------------------------------------------------------------------------------------- budget


def test_training_refuses_to_exceed_the_target(tmp_path, tiny_settings, tiny_images) -> None:
    from dataclasses import replace

    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    m = training.plan.mechanism
    # As if the noise had been set by hand to half of what the target needs.
    training.plan = replace(training.plan, mechanism=replace(m, noise_multiplier=m.noise_multiplier / 2))
    with pytest.raises(BudgetExceeded, match="refused"):
        finish(training)
    ledger = Ledger(training.run.ledger_path)
    assert len(training.private_log.read()) == charged_steps(ledger) < 6
    assert ledger.epsilon() <= 8


def test_no_step_is_taken_before_it_is_in_the_ledger(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    seen = []
    real = private_module.noisy_mean

    def spy(clipped, **kwargs):
        seen.append((kwargs["step"], charged_steps(Ledger(training.run.ledger_path))))
        return real(clipped, **kwargs)

    monkeypatch.setattr(private_module, "noisy_mean", spy)
    finish(training)
    assert [s for s, _ in seen] == list(range(6))
    assert all(charged > step for step, charged in seen)
    assert charged_steps(Ledger(training.run.ledger_path)) == len(seen)


def test_batches_are_divided_by_the_expected_size_and_may_be_empty(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    settings = merged(tiny_settings, private={"batch": 1, "steps": 12})
    training = begin(settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    divisors, sizes = [], []
    real = private_module.noisy_mean

    def spy(clipped, **kwargs):
        divisors.append(kwargs["expected_examples"])
        sizes.append(clipped.examples)
        return real(clipped, **kwargs)

    monkeypatch.setattr(private_module, "noisy_mean", spy)
    finish(training)
    assert divisors == [pytest.approx(1.0)] * 12
    assert 0 in sizes
    assert len(set(sizes)) > 1
    assert len(sizes) == 12


def test_physical_batch_does_not_change_the_sum_that_is_released(
    tiny_settings, tiny_images, tmp_path, monkeypatch
) -> None:
    """One logical batch in pieces of 5 or whole: the same number of examples, each used once."""
    counts = []
    real = private_module.noisy_mean

    def spy(clipped, **kwargs):
        counts[-1].append((clipped.examples, len(clipped.norms)))
        return real(clipped, **kwargs)

    monkeypatch.setattr(private_module, "noisy_mean", spy)
    for physical in (5, 100):
        counts.append([])
        settings = merged(tiny_settings, private={"physical_batch": physical})
        finish(begin(settings, tiny_images(), tmp_path / str(physical), stages={"variant": "dpdm"}))
    assert counts[0] == counts[1]
    assert all(a == b for a, b in counts[0])


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"privacy": {"epsilon": 8, "delta": 0.02}}, "must be below 1/records"),
        ({"private": {"batch": 61}}, "only 60 records"),
        ({"network": {"size": "enormous"}}, "must be one of"),
        ({"program": {"name": "lively-leaves"}}, "lively-leaves"),
        ({"program": {"params": {"shape": "heart"}}}, "heart"),
        ({"private": {"batch": 1, "steps": 1}, "privacy": {"epsilon": 1e-9}}, "no noise level"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    sections, message, tmp_path, tiny_settings, tiny_images
) -> None:
    with pytest.raises(ConfigError, match=message):
        begin(tiny_settings, tiny_images(), tmp_path / "r", **sections)
    assert not (tmp_path / "r").exists()


def test_resolution_and_single_class_are_refused(tmp_path, tiny_settings, tiny_images) -> None:
    images = np.zeros((60, 10, 10), dtype=np.uint8)
    labels = (np.arange(60) % 2).astype(np.int64)
    with pytest.raises(ConfigError, match="multiple of 4"):
        begin(tiny_settings, (images, labels), tmp_path / "r", network={"size": "tiny"})
    one, _ = tiny_images()
    with pytest.raises(ConfigError, match="--unconditional"):
        begin(tiny_settings, (one, np.zeros(60, dtype=np.int64)), tmp_path / "r")
    config = load_config(
        merged(
            tiny_settings,
            privacy={"epsilon": 8, "insecure_seed": 1},
            data={"labels": False},
            stages={"variant": "dpdm"},
        )
    )
    training = finish(api.prepare(config, tmp_path / "u", (one, None)))
    samples = Generator(training.run.release).sample(3)
    assert samples.labels is None
    assert samples.images.shape == (3, 1, 8, 8)


def test_existing_folder_is_never_written_into(tmp_path, tiny_settings, tiny_images) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(RunError, match="not an empty folder"):
        begin(tiny_settings, tiny_images(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_python_api_in_a_few_lines(tmp_path, tiny_settings, tiny_images) -> None:
    import dpsyngen

    images, labels = tiny_images()
    run = dpsyngen.train((images, labels), epsilon=5, out=tmp_path / "r", settings=tiny_settings)
    figures = dpsyngen.evaluate(
        run, data=(images, labels), test=(images, labels), images=60, classifiers=("logreg",), sampling={"steps": 2}
    )
    assert 0 <= figures["cas"]["logreg"]["accuracy"] <= 1
    measured = figures["features"]["pixels-pca"]
    assert measured["metrics"]["frechet"]["value"] > 0
    assert measured["ceiling_images"] == 60  # drawn by the run's own program
    private, public = dpsyngen.write_report(run)
    assert private.parent == run.private
    assert public.parent == run.release
    kinds = [e.kind for e in Ledger(run.ledger_path).entries]
    assert kinds == ["public", "dp", "dp", "dp", "private"]
    assert Ledger(run.ledger_path).epsilon() <= 5
