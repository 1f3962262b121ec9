"""Feature extractors, and the figures made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import FeatureSpec, evaluate_images
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
    for name in ("text.pth", "other.pth", "piece.pth", "missing.pth"):
        with pytest.raises(DataError, match="does not hold the weights"):
            load_inception(tmp_path / name)


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


def test_all_figures_carry_their_protocol() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(300) % 10
    specs = [FeatureSpec("pixels-pca")]
    bad = evaluate_images(noise, labels, reference=train, test=test, features=specs, classifiers=("logreg",))
    good = evaluate_images(
        train.images[:300], train.labels[:300], reference=train, test=test, features=specs, classifiers=("logreg",)
    )
    json.dumps(bad)
    distance = "frechet"
    assert good[distance]["pixels-pca"]["distance"] < 0.2 * bad[distance]["pixels-pca"]["distance"]
    assert good["cas"]["logreg"]["accuracy"] > 0.8 > 0.4 > bad["cas"]["logreg"]["accuracy"]
    figure = bad[distance]["pixels-pca"]
    assert figure["generated_images"] == 300
    assert figure["real_images"] == len(train)
    assert figure["floor_images"] == len(test)
    assert figure["floor"] < figure["distance"]
    assert figure["enough_images"]
    assert bad["cas_chosen"] == "logreg"
    assert bad["protocol"] == {
        "generated_images": 300,
        "real_train_images": len(train),
        "real_test_images": len(test),
        "seed": 0,
    }
    without = evaluate_images(noise, None, reference=train, test=None, features=specs)
    assert without["cas"] == {}
    assert "floor" not in without[distance]["pixels-pca"]
    with pytest.raises(ConfigError, match="same size"):
        evaluate_images(noise[:, :, :4, :4], None, reference=train, test=None)
