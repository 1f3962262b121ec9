"""Feature extractors, and the figures made of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import FeatureSpec, make_extractor
from dpsyngen.evaluation.inception import FidInception, load_inception, tf1_resize


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return load_images("digits").images


def test_pixels_pca(images) -> None:
    extractor = FeatureSpec("pixels-pca").make()
    with pytest.raises(ConfigError, match="fitted"):
        extractor(images)
    extractor.fit(images)
    features = extractor(images)
    assert features.shape == (len(images), 64)
    covariance = np.cov(features.T.astype(np.float64))
    variances = np.diag(covariance)
    assert (np.diff(variances) <= 1e-6).all()  # strongest first
    assert abs(covariance - np.diag(variances)).max() < 1e-4  # uncorrelated
    # 64 components of 64 pixels keep all distances.
    flat = images.reshape(len(images), -1) / 255.0
    assert np.linalg.norm(features[0] - features[1]) == pytest.approx(np.linalg.norm(flat[0] - flat[1]), rel=1e-4)
    with pytest.raises(ConfigError, match="pixels"):
        extractor(images[:, :, :4, :4])
    few = FeatureSpec("pixels-pca").make()
    few.fit(images[:10])
    assert few(images).shape == (len(images), 9)


def test_efficientnet(images) -> None:
    extractor = FeatureSpec("efficientnet-lite0").make()
    features = extractor(images[:5])
    assert features.shape == (5, 1280)
    assert extractor.config()["resized_to"] == 96
    extractor.batch_size = 2
    np.testing.assert_allclose(extractor(images[:5]), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(extractor(images[:5].repeat(3, 1)), features, rtol=1e-4, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0.1


PUBLISHED = {  # names and shapes in pt_inception-2015-12-05-6726825d.pth
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_1a_3x3.bn.running_var": (32,),
    "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch1x1.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
    "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
}


def test_inception_has_the_published_tensors() -> None:
    network = FidInception()
    state = network.state_dict()
    for name, shape in PUBLISHED.items():
        assert tuple(state[name].shape) == shape, name
    assert network.dim == 2048
    # 21.8 M parameters in the published network without its classifier.
    assert sum(p.numel() for p in network.parameters()) == 21_785_568


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A narrow network with random weights, stored like the published file (classifier included)."""
    torch.manual_seed(0)
    state = FidInception(narrow=16).state_dict()
    state["fc.weight"] = torch.zeros(1008, 128)
    folder = tmp_path_factory.mktemp("weights")
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, folder / "w.pth")
    save_file(state, folder / "w.safetensors")
    return folder


def test_inception_features_from_either_format(stand_in, images) -> None:
    a, b = (FeatureSpec("inception", stand_in / f"w.{e}").make() for e in ("pth", "safetensors"))
    features = a(images[:3])
    assert features.shape == (3, 128)
    np.testing.assert_allclose(features, b(images[:3]), rtol=1e-5)
    assert a.config()["weights"] == "w.pth"
    assert np.abs(features[0] - features[1]).max() > 0


def test_wrong_weights_files(stand_in, tmp_path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    state = torch.load(stand_in / "w.pth", weights_only=True)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "piece.pth")
    state["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(3, 5, 1, 1)
    torch.save(state, tmp_path / "shape.pth")
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(64, 3, 7, 7)  # the stem of a ResNet
    torch.save(state, tmp_path / "stem.pth")
    for name in ("text.pth", "other.pth", "piece.pth", "missing.pth", "shape.pth", "stem.pth"):
        with pytest.raises(DataError, match="does not hold the weights"):
            load_inception(tmp_path / name)
    with pytest.raises(DataError, match=r"Mixed_7c.branch_pool.conv.weight.*\(3, 5, 1, 1\), not \(12, 128, 1, 1\)"):
        load_inception(tmp_path / "shape.pth")
    with pytest.raises(DataError, match=r"\(64, 3, 7, 7\)"):
        load_inception(tmp_path / "stem.pth")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a weights file ran')",))


def test_code_in_a_weights_file_is_not_run(tmp_path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError):
        load_inception(tmp_path / "evil.pth")


def test_no_network_is_said_with_a_way_out(monkeypatch) -> None:
    import pooch

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(DataError, match="--inception-weights"):
        FeatureSpec("inception").make()


def test_resizing_as_tensorflow_1_does() -> None:
    x = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    # Positions 0, 0.5, 1, 1.5 of the source, the last beyond its end: no half-pixel shift, edges repeated.
    expected = torch.tensor([[0.0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]])
    assert torch.equal(tf1_resize(x, 4)[0, 0], expected)
    assert torch.equal(tf1_resize(x, 2), x)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="pixels-pca, efficientnet-lite0, inception"):
        FeatureSpec("vibes")
    with pytest.raises(ConfigError, match="only"):
        FeatureSpec("pixels-pca", weights="x")
    with pytest.raises(ConfigError, match="pixels-pca, efficientnet-lite0, inception"):
        make_extractor("vibes")
    with pytest.raises(ConfigError, match="take components, not side"):
        make_extractor("pixels-pca", side=96)
    with pytest.raises(ConfigError, match="multiple of 32"):
        make_extractor("efficientnet-lite0", side=100)
    with pytest.raises(ConfigError, match="at least 1"):
        make_extractor("pixels-pca", components=0)


@pytest.mark.parametrize("name", ["pixels-pca", "efficientnet-lite0", "inception"])
def test_batches_change_nothing_and_dim_is_told(name, stand_in, images) -> None:
    options = {"inception": {"weights": stand_in / "w.pth"}, "efficientnet-lite0": {"side": 32}}.get(name, {})
    extractor = make_extractor(name, **options)
    extractor.fit(images)
    few, lines = images[:5], []
    features = extractor(few, batch_size=5)
    assert features.dtype == np.float32
    assert features.shape == (5, extractor.dim)
    assert extractor.config()["dimensions"] == extractor.dim
    assert extractor.config()["name"] == extractor.name == name
    scale = np.abs(features).max()
    np.testing.assert_allclose(
        extractor(few, batch_size=2, on_progress=lines.append) / scale, features / scale, atol=1e-4
    )
    assert lines == ["features of 5 of 5 images"]
    for wrong in (few.astype(np.float32), few[0], few.repeat(2, 1), few[:0]):
        with pytest.raises(ConfigError, match="must be uint8"):
            extractor(wrong)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        extractor(few, batch_size=0)


@pytest.mark.parametrize("n", [40, 400])
def test_pca_axes_are_those_of_the_covariance_with_few_and_with_many_images(n) -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(12, 12)) * np.geomspace(60, 1, 12)
    pixels = np.clip(128 + rng.normal(size=(n, 12)) @ spread.T, 0, 255).astype(np.uint8)
    images = np.concatenate([pixels, np.zeros((n, 52), np.uint8)], 1).reshape(n, 1, 8, 8)  # 40 images < 64 pixels
    extractor = make_extractor("pixels-pca", components=5)
    with pytest.raises(ConfigError, match="fitted"):
        _ = extractor.dim
    extractor.fit(images)
    expected = np.linalg.eigvalsh(np.cov(pixels.T / 255.0))[::-1][:5]
    np.testing.assert_allclose(extractor(images).var(0, ddof=1), expected, rtol=1e-4)
    # Axes have unit length: no projection is longer than the image.
    assert (np.linalg.norm(extractor(images[::-1]), axis=1) <= 8).all()


def test_importing_evaluation_is_light() -> None:
    code = (
        "import sys, dpsyngen.evaluation\n"
        "heavy = {'torch', 'sklearn', 'scipy', 'pooch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
