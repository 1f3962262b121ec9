"""Whole runs in small: variants, the private/release split, stamps, refusals."""

from __future__ import annotations

import json
import math
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dpsyngen
import dpsyngen.privacy.noise as noise_module
from dpsyngen import Generator
from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.diffusion.stages import stage_map
from dpsyngen.errors import BudgetExceeded, ConfigError, RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.log import JsonLines, Note
from dpsyngen.training.private import charged_steps
from dpsyngen.training.public import PRETRAIN, levels_of, pretraining
from tests.training.short_runs import begin, bytes_of, finish, merged, start

# ------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("stages", "networks"),
    [
        ({"variant": "dpdm"}, {"context"}),
        pytest.param({"variant": "finetune"}, {"pretrain", "context"}, marks=pytest.mark.slow),
        pytest.param({"variant": "cleaning"}, {"cleaning", "context"}, marks=pytest.mark.slow),
        pytest.param({"variant": "coarse"}, {"coarse", "context"}, marks=pytest.mark.slow),
        pytest.param({"variant": "both"}, {"cleaning", "coarse", "context"}, marks=pytest.mark.slow),
        ({"variant": "both", "pretrain": True}, {"pretrain", "cleaning", "coarse", "context"}),
        pytest.param({"variant": "both", "networks": "shared"}, {"shared"}, marks=pytest.mark.slow),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_pre_training_can_be_matched_to_the_private_stage(tmp_path, tiny_settings, tiny_images) -> None:
    """The third configuration of the published code: programs at log σ > τ_cleaning alone, then DP-SGD there."""
    matched = pretraining(stage_map("cleaning", pretrain="matched"))
    assert (matched.low, matched.high) == (-3.0, math.inf)
    assert pretraining(stage_map("cleaning", pretrain=True)) == pretraining(stage_map("dpdm", pretrain="matched"))

    def weights(name: str, **stages: object) -> bytes:
        training = begin(tiny_settings, tiny_images(), tmp_path / name, stages=stages)
        levels: list[float] = []
        step = training._public_step

        def listening(stage, compute):
            if stage.name == PRETRAIN:
                levels.extend(levels_of(training.config.network, stage).sample(500, 1, torch.Generator()).flatten())
            return step(stage, compute)

        training._public_step = listening
        run = finish(training).run
        assert min(levels) >= math.exp(-3) * (1 - 1e-6) or stages["pretrain"] is True
        return run.weights("pretrain").read_bytes()

    everywhere = weights("a", variant="cleaning", pretrain=True)
    assert everywhere == weights("b", variant="dpdm", pretrain=True)
    assert everywhere != weights("c", variant="cleaning", pretrain="matched")


def test_of_many_images_that_were_left_out_some_are_named_and_all_are_kept(
    tmp_path, tiny_settings, tiny_images
) -> None:
    dataset = replace(load_images(tiny_images()), skipped=tuple(f"{i}.png: broken" for i in range(50)))
    told: list[str] = []
    run = start(
        load_config(merged(tiny_settings, privacy={"epsilon": 8})),
        dataset,
        tmp_path / "r",
        on_event=lambda event: told.append(event.text) if isinstance(event, Note) else None,
    ).run
    lines = [line for line in told if "left out" in line]
    assert lines[19:] == [
        "  left out: 19.png: broken",
        "  left out: 30 more; private/data.json of the run has them all",
    ]
    assert "49.png: broken" in (run.private / "data.json").read_text()


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
    dpsyngen.write_report(run)
    assert set(bytes_of(run.release)) == {
        "PRIVACY.md",
        "README.md",
        "config.yaml",
        "denoiser/denoiser.py",
        "generator.json",
        "model_index.json",
        "pipeline.py",
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
        private_html, public_html = dpsyngen.write_report(run)
        statement = json.loads((run.release / "privacy.json").read_text())
        assert statement["private"] is is_private
        for text in ((run.release / "PRIVACY.md").read_text(), public_html.read_text(), private_html.read_text()):
            assert ("NOT PRIVATE" in text) is (not is_private)
        assert Generator(run.release).private is is_private
    assert json.loads((open_run.release / "privacy.json").read_text())["epsilon"] == "inf"
    assert math.isinf(Ledger(open_run.ledger_path).epsilon())


@pytest.mark.slow
def test_report_of_the_release_has_nothing_private_and_escapes_names(tmp_path, tiny_settings, tiny_images) -> None:
    images, labels = tiny_images()
    np.savez(
        tmp_path / "d.npz",
        images=images,
        labels=labels,
        class_names=np.array(["<script>alert(1)</script>", "b & c", "日本"]),
    )
    run = finish(begin(tiny_settings, tmp_path / "d.npz", tmp_path / "r")).run
    dpsyngen.evaluate(run, data=tmp_path / "d.npz", images=30, classifiers=())
    private_html, public_html = dpsyngen.write_report(run)
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
    real = noise_module.noisy_mean

    def spy(clipped, **kwargs):
        seen.append((kwargs["step"], charged_steps(Ledger(training.run.ledger_path))))
        return real(clipped, **kwargs)

    monkeypatch.setattr(noise_module, "noisy_mean", spy)
    finish(training)
    assert [s for s, _ in seen] == list(range(6))
    assert all(charged > step for step, charged in seen)
    assert charged_steps(Ledger(training.run.ledger_path)) == len(seen)


def test_nothing_is_released_of_steps_that_the_ledger_lacks(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.training.private.charge_ahead", lambda ledger, dp, step: None)
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    with pytest.raises(AssertionError, match="6 steps taken, 0 in the ledger"):
        finish(training)
    assert not training.run.complete


def test_batches_are_divided_by_the_expected_size_and_may_be_empty(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    settings = merged(tiny_settings, private={"batch": 1, "steps": 12})
    training = begin(settings, tiny_images(), tmp_path / "r", stages={"variant": "dpdm"})
    divisors, sizes = [], []
    real = noise_module.noisy_mean

    def spy(clipped, **kwargs):
        divisors.append(kwargs["expected_examples"])
        sizes.append(clipped.examples)
        return real(clipped, **kwargs)

    monkeypatch.setattr(noise_module, "noisy_mean", spy)
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
    real = noise_module.noisy_mean

    def spy(clipped, **kwargs):
        counts[-1].append((clipped.examples, len(clipped.norms)))
        return real(clipped, **kwargs)

    monkeypatch.setattr(noise_module, "noisy_mean", spy)
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


@pytest.mark.slow
def test_python_api_in_a_few_lines(tmp_path, tiny_settings, tiny_images) -> None:
    import dpsyngen

    images, labels = tiny_images()
    run = dpsyngen.train((images, labels), epsilon=5, out=tmp_path / "r", settings=tiny_settings)
    figures = dpsyngen.evaluate(
        run,
        data=(images, labels),
        test=(images, labels),
        images=60,
        classifiers=("logreg",),
        sampling={"steps": 2, "seed": 7},
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
