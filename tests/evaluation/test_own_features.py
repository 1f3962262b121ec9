"""Features from a user's own file."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import FeatureSpec, evaluate_images, make_extractor

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        assert x.dtype == torch.float32 and x.shape[1] == 3 and 0 <= x.min() and x.max() <= 1 and x.max() > 0.5
        assert not torch.is_grad_enabled()
        return self.drop(self.layer(x)).mean((2, 3))

class Grey(Net):
    channels = 1
    def forward(self, x):
        assert x.shape[1] == 1
        return x.flatten(1)

net = Net()

def make():
    return Net()

def mean(images):
    return images.mean((2, 3)).numpy()

def flat(images):
    return images

def one_short(images):
    return images.flatten(1)[:-1]

def nothing(images):
    return None

def not_finite(images):
    return images.flatten(1) / 0

def broken(images):
    raise RuntimeError("no such layer")

def varying(images):
    return images.flatten(1)[:, : 3 + len(images)]

number = 3

def failing_factory():
    raise OSError("weights are missing")
"""


@pytest.fixture
def images() -> np.ndarray:
    return load_images("digits").images[:10]


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_features.py"
    path.write_text(CODE)
    return lambda name: make_extractor(f"{path}:{name}", batch_size=4)


@pytest.mark.parametrize("name", ["Net", "make", "net"])
def test_module_class_and_factory_give_the_same(own, images, tmp_path, name) -> None:
    extractor = own(name)
    features = extractor(images)
    assert features.shape == (10, 4)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, own("Net")(images), rtol=1e-6)
    np.testing.assert_array_equal(extractor(images), features)  # evaluation mode: dropout draws nothing
    config = extractor.config()
    assert config["file"] == "my_features.py"
    assert config["sha256"] == hashlib.sha256((tmp_path / "my_features.py").read_bytes()).hexdigest()
    assert config["dimensions"] == 4
    assert str(tmp_path) not in json.dumps(extractor.identity())


def test_functions_and_grey_images(own, images) -> None:
    np.testing.assert_allclose(own("mean")(images), images.mean((2, 3)).repeat(3, 1) / 255, rtol=1e-5)
    assert own("mean").identity() is None  # what a function depends on cannot be told
    np.testing.assert_allclose(own("Grey")(images), images.reshape(10, -1) / 255, rtol=1e-6)
    with pytest.raises(ConfigError, match="takes grey images"):
        own("Grey")(images.repeat(3, 1))
    assert own("mean").config()["dimensions"] is None  # not known before some were computed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", r"shape \(4, 3, 8, 8\) for 4 images, but must return \[4, d\]"),
        ("one_short", r"shape \(3, 192\) for 4 images"),
        ("nothing", "returned NoneType"),
        ("not_finite", "NaN or infinite"),
        ("broken", "on images of shape .* failed: RuntimeError: no such layer"),
        ("varying", "returned 5 features, but 7 before"),
        ("number", "is int, but must be"),
        ("failing_factory", "OSError: weights are missing"),
        ("missing", "has nothing called 'missing'"),
    ],
)
def test_what_is_wrong_is_said(own, images, name, message) -> None:
    with pytest.raises(ConfigError, match=message):
        own(name)(images)


def test_files_that_cannot_be_used(tmp_path, images) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    (tmp_path / "wrong.py").write_text("def f(:")
    for name, message in (
        (f"{tmp_path}/none.py:f", "no such file"),
        (f"{tmp_path}/bad.py:f", "ModuleNotFoundError"),
        (f"{tmp_path}/wrong.py:f", "SyntaxError"),
        ("nothing_of_that_name.part:f", "ModuleNotFoundError"),
        ("sys:path", "has no file"),
        ("a.py:not a name", "path/to/module.py:name or package.module:name"),
        (":f", "package.module:name"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_extractor(name)
    with pytest.raises(ConfigError, match="or your own, given as"):
        FeatureSpec("vibes")
    with pytest.raises(ConfigError, match="'inception' only"):
        FeatureSpec("a.py:f", weights="w.pth")


def test_an_importable_module(tmp_path, monkeypatch, images) -> None:
    (tmp_path / "a_package_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        extractor = make_extractor("a_package_of_mine:Net")
        assert extractor(images).shape == (10, 4)
        assert extractor.config()["file"] == "a_package_of_mine.py"
    finally:
        sys.modules.pop("a_package_of_mine", None)


def test_identity_follows_file_and_weights(own, tmp_path) -> None:
    before = own("Net").identity()
    assert before == own("Net").identity()
    (tmp_path / "my_features.py").write_text(CODE.replace("manual_seed(0)", "manual_seed(1)"))
    other = own("Net").identity()
    assert other["sha256"] != before["sha256"]
    assert other["weights_sha256"] != before["weights_sha256"]


def test_nothing_is_run_before_it_is_made(tmp_path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('ran')")
    FeatureSpec(f"{tmp_path}/trap.py:f")
    with pytest.raises(SystemExit):
        FeatureSpec(f"{tmp_path}/trap.py:f").make()


def test_figures_of_own_features_are_stamped(tmp_path) -> None:
    (tmp_path / "my_features.py").write_text(CODE)
    name = f"{tmp_path}/my_features.py:net"
    train, test = load_images("digits"), load_images("digits:test")
    out = evaluate_images(train.images[:60], None, reference=train, test=test, features=(name,), bootstrap=50)
    figure = out["features"][name]
    assert len(figure["config"]["sha256"]) == len(figure["config"]["weights_sha256"]) == 64
    assert figure["config"]["dimensions"] == 4
    assert figure["metrics"]["frechet"]["value"] > 0
    json.dumps(out, allow_nan=False)


def test_a_module_may_have_no_weights(tmp_path, images) -> None:
    (tmp_path / "plain.py").write_text("from torch import nn\nflat = nn.Flatten()\n")
    extractor = make_extractor(f"{tmp_path}/plain.py:flat")
    assert extractor(images).shape == (10, 3 * 64)
    assert extractor.identity()["weights_sha256"] == hashlib.sha256().hexdigest()
    assert torch.is_grad_enabled()
