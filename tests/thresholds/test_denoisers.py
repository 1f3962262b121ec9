"""Public denoisers for measuring: what they are of, that they are kept, and that they go on where they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dpsyngen.thresholds.denoisers as module
from dpsyngen.config import load_config
from dpsyngen.errors import RunError
from dpsyngen.programs import make_program
from dpsyngen.thresholds.denoisers import Family, GivenImages, PublicDenoisers, every_level
from dpsyngen.thresholds.gap import HIGHEST, LOWEST
from dpsyngen.training.plan import Shape
from dpsyngen.workers import Workers

SHAPE = Shape(8, 1, (), 1)


def settings(**public: object):
    values = {"steps": 6, "batch": 4, "copies": 1, "checkpoint_every": 2, **public}
    return load_config({"network": {"size": "nano"}, "public": values})


def program(name: str = "dead-leaves", **params: object) -> Family:
    return Family(name, make_program(name, resolution=8, channels=1, **params))


def given(seed: int = 0) -> Family:
    images = np.random.default_rng(seed).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    return Family("proxy", GivenImages(resolution=8, channels=1, images=images))


def weights(denoiser: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()])


def test_levels_are_uniform_over_the_axis() -> None:
    sigma = every_level().sample(20_000, 1, torch.Generator().manual_seed(0)).log()
    assert float(sigma.min()) >= LOWEST - 1e-6
    assert float(sigma.max()) <= HIGHEST + 1e-6
    share = torch.histc(sigma, 10, LOWEST, HIGHEST) / 20_000
    np.testing.assert_allclose(share, 0.1, atol=0.012)


def test_trained_once_and_read_after_that(tmp_path, monkeypatch) -> None:
    networks = PublicDenoisers(tmp_path / "n", settings(), SHAPE, "cpu", Workers(1))
    seen = []
    first = networks.get(program(), 0, seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(module, "train_public", lambda *a: pytest.fail("trained again"))
    assert torch.equal(weights(networks.get(program(), 0)), weights(first))
    assert [p.name for p in (tmp_path / "n").iterdir()] == [networks.path(program(), 0).name]
    assert not first.training


def test_interrupted_training_starts_again_and_comes_to_the_same_weights(tmp_path) -> None:
    whole = PublicDenoisers(tmp_path / "a", settings(), SHAPE, "cpu", Workers(1)).get(program(), 1)
    networks = PublicDenoisers(tmp_path / "b", settings(), SHAPE, "cpu", Workers(1))

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        networks.get(program(), 1, stop)
    assert not networks.path(program(), 1).exists()
    assert torch.equal(weights(networks.get(program(), 1)), weights(whole))
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_a_damaged_network_is_refused(tmp_path) -> None:
    networks = PublicDenoisers(tmp_path, settings(), SHAPE, "cpu", Workers(1))
    networks.path(program(), 0).write_bytes(b"no weights")
    with pytest.raises(RunError, match="damaged"):
        networks.get(program(), 0)


def test_everything_that_decides_the_weights_is_in_the_key(tmp_path) -> None:
    networks = PublicDenoisers(tmp_path, settings(), SHAPE, "cpu", Workers(1))
    keys = [
        networks.key(program(), 0),
        networks.key(program(), 1),
        networks.key(program("contours"), 0),
        networks.key(program(shape="disc"), 0),
        networks.key(given(), 0),
        networks.key(given(1), 0),
        PublicDenoisers(tmp_path, settings(steps=7), SHAPE, "cpu", Workers(1)).key(program(), 0),
        PublicDenoisers(tmp_path, settings(), Shape(16, 1, (), 1), "cpu", Workers(1)).key(program(), 0),
    ]
    assert len(set(keys)) == len(keys)
    other = PublicDenoisers(tmp_path, settings(checkpoint_every=3), Shape(8, 1, ("a",), 9), "cpu", Workers(2))
    assert other.key(program(), 0) == keys[0]


def test_families_share_neither_start_nor_images(tmp_path) -> None:
    networks = PublicDenoisers(tmp_path, settings(steps=1, learning_rate=1e-9), SHAPE, "cpu", Workers(1))
    starts = [weights(networks.get(f, s)) for f, s in ((program(), 0), (program(), 1), (program("contours"), 0))]
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(starts[i], starts[j], atol=1e-3)


def test_given_images_stand_in_for_a_program() -> None:
    family = given()
    np.testing.assert_array_equal(family.program.batch([3, 0]), family.program.images[[3, 0]])
    assert family.program.config()["images"] == 20
    assert len(family.program.config()["sha256"]) == 64


def test_all_given_images_are_used_and_no_others(tmp_path, monkeypatch) -> None:
    family, used = given(), []
    real = GivenImages._draw

    def draw(self, indices, out) -> None:
        used.extend(int(i) for i in indices)
        real(self, indices, out)

    monkeypatch.setattr(GivenImages, "_draw", draw)
    PublicDenoisers(tmp_path, settings(steps=10), SHAPE, "cpu", Workers(1)).get(family, 0)
    assert sorted(used) == list(range(20))  # each drawn once, and kept


def test_measuring_images_are_of_no_network(tmp_path, monkeypatch) -> None:
    family = program()
    used: list[int] = []
    real = type(family.program)._draw

    def draw(self, indices, out) -> None:
        used.extend(int(i) for i in indices)
        real(self, indices, out)

    monkeypatch.setattr(type(family.program), "_draw", draw)
    family.measuring_images(50)
    measuring = set(used)
    used.clear()
    networks = PublicDenoisers(tmp_path, settings(), SHAPE, "cpu", Workers(1))
    for seed in (0, 1):
        networks.get(family, seed)
    assert len(used) == len(set(used)) == 48
    assert not measuring & set(used)
    # Nor of any run: those begin at 0, 10⁹ and 2·10⁹.
    assert min(used) > 10**11


def test_divergence_is_said(tmp_path, monkeypatch) -> None:
    networks = PublicDenoisers(tmp_path, settings(learning_rate=1e3), SHAPE, "cpu", Workers(1))
    real = module.PublicStep.__call__
    monkeypatch.setattr(module.PublicStep, "__call__", lambda *a: real(*a) * float("nan"))
    with pytest.raises(RunError, match=r"diverged at step 1.*public\.learning_rate"):
        networks.get(program(), 0)
