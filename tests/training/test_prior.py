"""The prior: it follows from a seed alone, learns nothing from Gaussians, and a run says that it used it."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images

import dpsyngen
from dpsyngen.config import load_config, with_options
from dpsyngen.diffusion.prior import SHIPPED, Prior, read_prior
from dpsyngen.diffusion.standalone import network_input
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.fit import carry_out, prepare, prepare_resume
from dpsyngen.privacy.certificate import Certificate, plain_words
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.programs import make_program
from dpsyngen.release.bundle import pack
from dpsyngen.release.verify import verify
from dpsyngen.report.html import write_report
from dpsyngen.training import prior as prior_module
from dpsyngen.training.prior import LEVELS, PriorSettings, Task, error_ratios, family_task, make_task, train_prior
from dpsyngen.training.run import FolderLock, Run

INSTANT = {"stages": {"variant": "instant", "tau_coarse": 1.0}, "network": {"prior": SHIPPED}}


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Tasks of a few images of 8 pixels."""
    monkeypatch.setattr(prior_module, "SIZES", {1: {8: prior_module._Size(1.0, 2, 32, 0.5)}})
    monkeypatch.setattr(prior_module, "family_task", lambda s, size, number: _task(s, number))
    monkeypatch.setattr(prior_module, "held_out", lambda settings: {})


def _task(settings: PriorSettings, number: int) -> Task:
    one = make_program("family", resolution=8, channels=1, seed=settings.seed, number=number)
    return make_task([one], 1e-4, number, images=80, fresh=8)


@pytest.mark.usefixtures("tiny")
def test_weights_follow_from_the_seed_to_the_bit_also_after_an_interruption(tmp_path, monkeypatch) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise Stop

    settings = PriorSettings(seed=3, steps=4)
    whole = train_prior(settings)
    with pytest.raises(Stop):
        train_prior(settings, tmp_path / "part", stop, every=2)
    resumed = train_prior(settings, tmp_path / "part", every=2)
    assert resumed.about == whole.about
    assert all(torch.equal(w, resumed.weights[k]) for k, w in whole.weights.items())
    other = train_prior(PriorSettings(seed=4, steps=4))
    assert other.about["sha256"] != whole.about["sha256"]
    with pytest.raises(ConfigError, match="remove it to begin anew"):
        train_prior(PriorSettings(seed=4, steps=4), tmp_path / "part")
    with monkeypatch.context() as other_programs:
        other_programs.setattr(prior_module, "PROGRAMS", {1: "scene"})
        with pytest.raises(ConfigError, match=r"'family'\}, but .*'scene'\}"):
            train_prior(settings, tmp_path / "part")
    for damaged in (b"", b"nonsense", (tmp_path / "part").read_bytes()[:-100]):
        (tmp_path / "part").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"part is damaged .*remove it to begin anew"):
            train_prior(settings, tmp_path / "part")


def test_the_largest_seed_has_tasks_that_no_training_sees(monkeypatch) -> None:
    monkeypatch.setattr(prior_module, "make_task", lambda programs, *_: programs[0].config()["seed"])
    last = 2**63 - 1
    families = [seed for name, seed in prior_module.held_out(PriorSettings(seed=last)).items() if "families" in name]
    assert set(families) == {0}


def test_tasks_are_functions_of_their_number() -> None:
    settings = PriorSettings(seed=1)
    a, b, c = (family_task(settings, 8, n) for n in (2, 2, 3))
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.gaussian.means, b.gaussian.means)
    assert a.images.shape != c.images.shape or not torch.equal(a.images, c.images)


def test_nothing_private_can_reach_the_training() -> None:
    """It imports nothing that reads images, runs or files of data, and takes settings alone."""
    tree = ast.parse(Path(prior_module.__file__).read_text())
    names = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    of_data = {
        n for n in names if n.startswith(("dpsyngen.data", "dpsyngen.training.run", "dpsyngen.training.session"))
    }
    assert of_data == {"dpsyngen.data.ImageDataset"}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_on_gaussian_images_nothing_is_learned(monkeypatch) -> None:
    """The Wiener filter is optimal there, so the error stays that of the filter; with the same mean and covariance, but
    pixels of two values, as many steps do better than the filter.
    """

    def task(draw: Callable[[np.ndarray], np.ndarray], seed: int) -> Task:
        pixels = draw(np.random.default_rng(seed).standard_normal((2000, 64)))
        images = np.clip(np.round(127.5 + 40 * pixels), 0, 255).astype(np.uint8).reshape(-1, 1, 8, 8)

        class Given:
            resolution, channels = 8, 1

            def batch(self, indices: range) -> np.ndarray:
                return images[np.asarray(indices)]

        return make_task([Given()], 0.0, 0, images=1500, fresh=500)  # type: ignore[list-item]

    def ratios(draw: Callable[[np.ndarray], np.ndarray]) -> list[float]:
        monkeypatch.setattr(prior_module, "family_task", lambda s, size, number: task(draw, number))
        # A rate and an average under which 100 steps move the weights three times as far as by default.
        learned = train_prior(PriorSettings(steps=100, learning_rate=0.06, ema=0.9))
        network = UNet("prior", 8, 1, 0, inputs=4)
        network.load_state_dict(learned.weights)
        return error_ratios(network, task(draw, 99), 500)

    assert ratios(lambda normal: normal) == pytest.approx([1] * len(LEVELS), abs=0.002)
    assert min(ratios(np.sign)) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "sizes"), [(1, (16, 16, 28)), (3, (16, 24))])
def test_a_shipped_prior_beats_the_filter_on_families_and_a_program_it_has_never_seen(channels, sizes) -> None:
    network = UNet("prior", 16, channels, 0, inputs=4 * channels)
    network.load_state_dict(read_prior(SHIPPED, channels).weights)
    # Over the levels below 1 they are 0.35 to 0.9, and 64 images tell each to a tenth.
    tasks = [family_task(PriorSettings(channels, seed=77), size, number) for number, size in enumerate(sizes)]
    ratios = np.mean([error_ratios(network, task, 64) for task in tasks], axis=0)
    assert all(r < 1 for level, r in zip(LEVELS, ratios, strict=True) if level < 0), ratios
    alien = make_task([make_program("random-network", resolution=16, channels=channels, seed=5)], 1e-4, 0)
    ratios = error_ratios(network, alien)
    assert np.mean([r for level, r in zip(LEVELS, ratios, strict=True) if level < 0]) < 1, ratios


class _Patches:
    """Of 32x32 pixels, anywhere in a photograph at half its size."""

    resolution, channels = 32, 3

    def __init__(self, photograph: np.ndarray) -> None:
        height, width = (2 * (side // 2) for side in photograph.shape[:2])
        self.small = photograph[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).astype(np.uint8)

    def batch(self, indices: range) -> np.ndarray:
        rng = np.random.default_rng(0)
        rows, columns = (rng.integers(0, side - 32, max(indices) + 1) for side in self.small.shape[:2])
        patches = [self.small[i : i + 32, j : j + 32] for i, j in zip(rows, columns, strict=True)]
        return np.stack([patches[i] for i in indices]).transpose(0, 3, 1, 2)


@pytest.mark.slow
def test_in_colour_a_shipped_prior_beats_the_filter_on_photographs() -> None:
    """At every level: a prior that saw nothing but drawings takes the fine texture of photographs for noise."""
    photographs = load_sample_images().images  # a temple, and a flower
    task = make_task([_Patches(photograph) for photograph in photographs], 1e-4, 0)  # type: ignore[misc]
    network = UNet("prior", 32, 3, 0, inputs=12)
    network.load_state_dict(read_prior(SHIPPED, 3).weights)
    ratios = error_ratios(network, task, 128)
    assert all(r < 0.97 for level, r in zip(LEVELS, ratios, strict=True) if level < 0), ratios


# ------------------------------------------------------------------------------------------------ in a run


def test_an_instant_run_costs_its_moments_and_says_what_it_stands_on(tmp_path, tiny_settings, tiny_images) -> None:
    settings = {k: v | INSTANT.get(k, {}) for k, v in tiny_settings.items()}
    run = dpsyngen.train(tiny_images(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    ledger, about = Ledger(run.ledger_path), read_prior(SHIPPED, 1).about
    assert [e.kind for e in ledger.entries] == ["public", "dp", "dp", "dp"]
    assert {e.details["query"] for e in ledger.entries[1:]} == {"moments"}
    assert ledger.entries[0].details["prior"] == about
    assert 3.9 < ledger.epsilon() <= 4.0
    certificate = json.loads((run.release / "privacy.json").read_text())
    assert certificate["prior"] == about
    assert [s["trained_by"] for s in certificate["stages"]] == ["prior", "moments"]
    assert about["sha256"] in (run.release / "PRIVACY.md").read_text()
    kept = load_file(run.weights("prior"))
    assert all(torch.equal(kept[f"network.{k}"], w) for k, w in read_prior(SHIPPED, 1).weights.items())
    generator = dpsyngen.Generator.load(run.path)
    labelled = generator.sample(6, labels=[0, 0, 0, 1, 1, 1]).images
    assert len(np.unique(labelled.reshape(6, -1), axis=0)) == 6
    assert generator.save(tmp_path / "b.zip").exists()
    assert verify(tmp_path / "b.zip").passed


def test_a_private_network_starts_from_the_prior_and_answers_as_it_does(tmp_path, tiny_settings, tiny_images) -> None:
    """With no class yet: what it knows of classes is zero at the start, and learned by DP-SGD."""
    from dpsyngen.training.networks import make_denoiser
    from dpsyngen.training.plan import Shape
    from tests.diffusion.test_gaussian import example

    settings = {k: dict(v) for k, v in tiny_settings.items()}
    settings["stages"] = {"variant": "residual", "tau_coarse": 1.0}
    settings["network"] = settings.get("network", {}) | {"prior": SHIPPED}
    run = dpsyngen.train(tiny_images(), epsilon=8.0, out=tmp_path / "r", settings=settings)
    assert Ledger(run.ledger_path).entries[0].details["prior"]["sha256"] == read_prior(SHIPPED, 1).about["sha256"]
    # In the cleaning stage it answers as it shipped: no private gradient is in it.
    kept, trained = load_file(run.weights("prior")), load_file(run.weights("context"))
    assert all(torch.equal(kept[f"network.{k}"], w) for k, w in read_prior(SHIPPED, 1).weights.items())
    assert not torch.equal(kept["network.out.bias"], trained["network.out.bias"])
    certificate = json.loads((run.release / "privacy.json").read_text())
    assert [s["trained_by"] for s in certificate["stages"]] == ["prior", "private", "moments"]
    assert "It answers as it is in the stage cleaning." in (run.release / "PRIVACY.md").read_text()
    from dpsyngen.diffusion.gaussian import GaussianDenoiser

    gaussian = GaussianDenoiser(example(k=3, size=64, d=6), (1, 8, 8), dtype=torch.float32)
    denoiser = make_denoiser(run.config, Shape(8, 1, ("a", "b", "c"), 100), True, 0, gaussian)
    plain = UNet("prior", 8, 1, 0, inputs=4)
    plain.load_state_dict(read_prior(SHIPPED, 1).weights)
    x, sigma = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    for labels in (torch.tensor([0, 1, 2, 3]), None):
        base, left = gaussian(x, sigma, labels), gaussian.left(sigma, labels)
        seen = network_input(x, sigma, base, left)
        expected = base + left * plain(seen, sigma.log() / 4)
        torch.testing.assert_close(denoiser(x, sigma, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["instant", "residual"])
def test_a_release_whose_weights_are_not_the_named_prior_does_not_verify(
    variant, tmp_path, tiny_settings, tiny_images
) -> None:
    """Weights that private images had trained could be slipped in as "the prior", and would cost no ε."""
    settings = {k: v | INSTANT.get(k, {}) for k, v in tiny_settings.items()}
    settings["stages"]["variant"] = variant
    settings["network"] = settings["network"] | {"prior": SHIPPED}
    run = dpsyngen.train(tiny_images(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    weights = load_file(run.weights("prior"))
    weights["network.out.bias"] += 0.01
    save_file(weights, run.weights("prior"))
    about = json.loads((run.release / "privacy.json").read_text())
    other = Prior.of({k.removeprefix("network."): w for k, w in weights.items()}, channels=1)
    pack(run, tmp_path / "b.zip")
    failed = [c for c in verify(tmp_path / "b.zip").checks if c.passed is False]
    assert [c.name for c in failed] == ["generator"]
    assert "contradicts the certificate in: prior" in failed[0].text
    # Nor does it help to name them, while the settings say that it is the prior that ships.
    about["prior"] = other.about
    (run.release / "privacy.json").write_text(Certificate.model_validate(about).to_json())
    (run.release / "PRIVACY.md").write_text(plain_words(Certificate.model_validate(about)))
    pack(run, tmp_path / "c.zip")
    failed = [c for c in verify(tmp_path / "c.zip").checks if c.passed is False]
    assert [c.name for c in failed] == ["settings"]
    assert "contradicts the certificate in: prior" in failed[0].text


def test_a_prior_of_ones_own_is_pinned_and_its_path_stays_at_home(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    settings = {k: dict(v) for k, v in tiny_settings.items()} | {"stages": {"variant": "residual", "tau_coarse": 1.0}}
    settings["network"] = settings["network"] | {"prior": "own.safetensors"}
    monkeypatch.chdir(tmp_path)
    network = UNet("prior", 32, 1, 0, inputs=4)
    Prior.of(network.state_dict(), channels=1).save(tmp_path / "own.safetensors")
    config = load_config(with_options(settings, privacy__epsilon=8.0))
    training = prepare(config, tmp_path / "r", tiny_images())
    steps = training.steps()
    while next(steps).phase == "moments":
        pass
    steps.close()
    assert training.run.config.network.prior == str(tmp_path / "own.safetensors")
    with torch.no_grad():
        network.out.bias += 1
    Prior.of(network.state_dict(), channels=1).save(tmp_path / "own.safetensors")
    with pytest.raises(RunError, match="another one than when the run was started"):
        prepare_resume(tmp_path / "r", tiny_images())
    with torch.no_grad():
        network.out.bias -= 1
    Prior.of(network.state_dict(), channels=1).save(tmp_path / "own.safetensors")
    monkeypatch.chdir(tmp_path.parent)
    assert carry_out(prepare_resume(tmp_path / "r", tiny_images()))
    released = (tmp_path / "r" / "release" / "config.yaml").read_text()
    assert "own.safetensors" not in released
    assert "a file of the holder's" in released
    pack(Run(tmp_path / "r"), tmp_path / "b.zip")
    assert verify(tmp_path / "b.zip").passed


def test_the_report_of_an_instant_run_says_who_answers_where(tmp_path, tiny_settings, tiny_images) -> None:
    settings = {k: v | INSTANT.get(k, {}) for k, v in tiny_settings.items()}
    run = dpsyngen.train(tiny_images(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    private, _ = write_report(run)
    page = private.read_text()
    assert "programs, shown the DP moments" in page
    assert read_prior(SHIPPED, 1).about["sha256"] in page
    assert "trained no network of this run" in page
    assert 'class="stage tone-prior">context<span>programs</span>' in page


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"prior": "nowhere.safetensors"}, "which is no prior"),
        ({"prior": __file__}, "which is no prior"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path, tiny_settings, tiny_images, network, message
) -> None:
    settings = {k: v | INSTANT.get(k, {}) for k, v in tiny_settings.items()}
    settings["network"] = {"label_dropout": 0.1} | network
    with pytest.raises(ConfigError, match=message):
        dpsyngen.train(tiny_images(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    assert not (tmp_path / "r").exists()


def test_the_command_makes_a_file_that_training_takes(tmp_path, call, monkeypatch) -> None:
    out = tmp_path / "p.safetensors"
    monkeypatch.setattr(
        prior_module,
        "train_prior",
        lambda settings, part, tell: Prior.of(
            UNet("prior", 32, 1, 0, inputs=4).state_dict(),
            channels=settings.channels,
            seed=settings.seed,
            error_over_wiener={"log_sigma": [0.0], "x": [1.0]},
        ),
    )
    with FolderLock(tmp_path / "p.safetensors.part.lock", out).held():
        code, _, err = call("prior", "train", "--out", out)
    assert code != 0
    assert f"another process is working on {out}" in err
    code, said, _ = call("prior", "train", "--out", out, "--steps", 3, "--seed", 5)
    assert code == 0
    assert str(out) in said
    assert read_prior(str(out), 1).about["seed"] == 5
    code, _, err = call("prior", "train", "--out", out)
    assert code == 2
    assert "written over" in err
    assert os.listdir(tmp_path) == [out.name]
    code, _, err = call("prior", "train", "--out", "")
    assert code == 2
    assert "--out is '.', but must be a file" in err
    code, _, err = call("prior", "train", "--out", tmp_path / "none" / "p")
    assert code == 2
    assert "in a folder that exists" in err
    code, _, err = call("prior", "train", "--out", tmp_path / "q", "--channels", "blue")
    assert code == 2
    assert "grey or rgb" in err
