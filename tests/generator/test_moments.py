"""Released DP moments from a stranger: refused with RunError, or sound; and drawing from sound ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import dpsyngen
from dpsyngen import Generator
from dpsyngen.errors import ConfigError, RunError
from tests.conftest import TINY_SETTINGS, tiny_arrays

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = TINY_SETTINGS | {"stages": {"variant": "residual", "tau_coarse": 1.0}}
    settings["network"] = settings["network"] | {"label_dropout": 0.0, "prior": "shipped"}
    settings["sampling"] = settings["sampling"] | {"guidance": 1.0}
    return dpsyngen.train(tiny_arrays(), epsilon=4.0, out=tmp_path_factory.mktemp("m") / "r", settings=settings).release


@pytest.fixture
def release(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "release")
    return tmp_path / "release"


def change_weights(release: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = release / "weights" / "gaussian.safetensors"
    path.write_bytes(save({k: v.contiguous() for k, v in change(load(path.read_bytes())).items()}))


def change_description(release: Path, change: Callable[[dict[str, Any]], object]) -> None:
    about = json.loads((release / "generator.json").read_text())
    change(about)
    (release / "generator.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "rest"}, "'rest' is missing"),
        (lambda t: t | {"more": torch.ones(1)}, "'more' is too much"),
        (lambda t: t | {"means": t["means"][:2]}, "means has shape"),
        (lambda t: t | {"means": t["means"].double()}, "means is of type"),
        (lambda t: t | {"means": t["means"] * float("nan")}, "means holds NaN"),
        (lambda t: t | {"covariances": t["covariances"] * float("inf")}, "covariances holds NaN or infinite"),
        (lambda t: t | {"covariances": -t["covariances"] - torch.eye(len(t["basis"].T))}, "negative eigenvalue"),
        (lambda t: t | {"basis": 2 * t["basis"]}, "not orthonormal"),
        (lambda t: t | {"rest": -t["rest"]}, "outside the basis is negative"),
        (lambda t: t | {"frequencies": t["frequencies"] + 1}, "sum to 1"),
        (lambda t: t | {"rest": t["rest"] + 1e7}, "above 1e6"),
    ],
)
def test_weights_that_are_no_moments(change, why, release) -> None:
    change_weights(release, change)
    with pytest.raises(RunError, match=rf"gaussian\.safetensors are damaged: .*{why}") as caught:
        Generator(release)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a.pop("moments"), "contradict each other"),
        (lambda a: a["moments"].update(rank=0), r"moments\.rank"),
        (lambda a: a["moments"].update(rank=10**9), r"moments\.rank"),
        (lambda a: a["moments"].update(rank=65), "has shape"),
        (lambda a: a.update(moments=[1]), "moments"),
        (lambda a: a["stages"][-1].update(trained_by="public"), "answered by 'gaussian'"),
        (lambda a: a["stages"][-1].update(network="context"), "answered by 'gaussian'"),
        (lambda a: a["stages"][1].update(network="gaussian"), "answered by 'gaussian'"),
        (lambda a: a["conditional"].pop("context"), "conditional says nothing of the networks context"),
        (lambda a: a.update(label_dropout=2.0), "label_dropout"),
        (lambda a: a.update(class_names=["a", "b"]), "has shape"),
    ],
)
def test_descriptions_that_do_not_fit(change, why, release) -> None:
    change_description(release, change)
    with pytest.raises(RunError, match=why):
        Generator(release)


def test_moments_that_nothing_asks_for_are_not_read(release) -> None:
    """A release without such a stage may not have them in its description either."""
    change_description(release, lambda a: a["stages"].pop())
    with pytest.raises(RunError, match="cover the whole"):
        Generator(release)


def test_a_stranger_may_not_ask_for_guidance_that_the_network_cannot_give(release) -> None:
    generator = Generator(release)
    for settings in ({"guidance": 2.0}, {"guidance": 0.0}):
        with pytest.raises(ConfigError, match="always saw the class"):
            generator.sample(2, **settings)
    assert generator.sample(2, guidance=1.0).images.shape == (2, 1, 8, 8)
    # An earlier version did not say with how many labels dropped it was trained.
    change_description(release, lambda a: a.pop("label_dropout"))
    assert Generator(release).sample(2, guidance=2.0).images.shape == (2, 1, 8, 8)


def test_moments_alone_take_no_guidance(tmp_path) -> None:
    settings = TINY_SETTINGS | {"stages": {"variant": "gaussian"}, "sampling": {"steps": 3}}
    generator = Generator(dpsyngen.train(tiny_arrays(), epsilon=4.0, out=tmp_path / "r", settings=settings).release)
    with pytest.raises(ConfigError, match="no network that knows classes"):
        generator.sample(2, guidance=3.5)


def test_images_without_labels_and_of_chosen_classes(release) -> None:
    generator = Generator(release)
    (unlabelled,) = generator.stream(5)
    assert unlabelled.shape == (5, 1, 8, 8)
    chosen = generator.sample(4, classes=[2])
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [2] * 4
    by_name = generator.sample(4, classes=[generator.class_names[2]])
    assert np.array_equal(chosen.images, by_name.images)
