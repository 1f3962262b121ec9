"""Feature extractors, and the figures made of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import FeatureSpec, inception, make_extractor
from dpsyngen.evaluation.inception import FidInception, _mean3, load_inception, tf1_resize
from tests.evaluation.inception_module import ModuleInception, with_random_weights


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
    network = ModuleInception()
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
    state = ModuleInception(narrow=16).state_dict()
    state["fc.weight"] = torch.zeros(1008, 128)
    folder = tmp_path_factory.mktemp("weights")
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, folder / "w.pth")
    return folder


def test_inception_features(stand_in, images) -> None:
    extractor = FeatureSpec("inception", stand_in / "w.pth").make()
    features = extractor(images[:3])
    assert features.shape == (3, 128)
    assert extractor.config()["weights"] == "w.pth"
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
    with pytest.raises(DataError, match=r"\[3, 5, 1, 1\]"):
        load_inception(tmp_path / "shape.pth")
    with pytest.raises(DataError, match=r"Mixed_7c\.branch_pool\.conv\.weight"):
        load_inception(tmp_path / "piece.pth")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a weights file ran')",))


def test_code_in_a_weights_file_is_not_run(tmp_path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError):
        load_inception(tmp_path / "evil.pth")


def test_no_network_is_said_with_a_way_out_for_every_command(monkeypatch, tmp_path) -> None:
    import pooch

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # `evaluate` alone has an option for the file.
    with pytest.raises(DataError, match=f"save it as {tmp_path}/dpsyngen/[0-9a-f]{{32}}-pt_inception.*`dpsyngen evalu"):
        FeatureSpec("inception").make()


def test_weights_are_kept_with_other_downloads_and_found_there_again(monkeypatch, tmp_path) -> None:
    """By the name that pooch gives, so that those of earlier versions are found; without a home folder, too."""
    import pooch

    monkeypatch.setattr(inception, "cache_home", lambda: tmp_path)
    (tmp_path / pooch.utils.unique_file_name(inception.WEIGHTS_URL)).write_bytes(b"weights")
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(pooch.core, "stream_download", None)
    assert inception.fetch_weights().read_bytes() == b"weights"


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
    with pytest.raises(ConfigError, match="batch_size is 0"):
        make_extractor("efficientnet-lite0", batch_size=0)


@pytest.mark.parametrize("name", ["pixels-pca", "efficientnet-lite0", "inception"])
def test_batches_change_nothing_and_the_number_of_features_is_told(name, stand_in, images) -> None:
    options = {"inception": {"weights": stand_in / "w.pth"}, "efficientnet-lite0": {"side": 32}}.get(name, {})
    extractor = make_extractor(name, **options)
    extractor.fit(images)
    few, lines = images[:5], []
    extractor.batch_size = 5
    features = extractor(few)
    assert features.dtype == np.float32
    assert features.shape == (5, extractor.config()["dimensions"])
    assert extractor.config()["name"] == extractor.name == name
    scale = np.abs(features).max()
    extractor.batch_size = 2
    np.testing.assert_allclose(extractor(few, on_progress=lines.append) / scale, features / scale, atol=1e-4)
    assert lines == ["features of 5 of 5 images"]
    for wrong in (few.astype(np.float32), few[0], few.repeat(2, 1), few[:0]):
        with pytest.raises(ConfigError, match="must be uint8"):
            extractor(wrong)


@pytest.mark.parametrize("n", [40, 400])
def test_pca_axes_are_those_of_the_covariance_with_few_and_with_many_images(n) -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(12, 12)) * np.geomspace(60, 1, 12)
    pixels = np.clip(128 + rng.normal(size=(n, 12)) @ spread.T, 0, 255).astype(np.uint8)
    images = np.concatenate([pixels, np.zeros((n, 52), np.uint8)], 1).reshape(n, 1, 8, 8)  # 40 images < 64 pixels
    extractor = make_extractor("pixels-pca", components=5)
    assert extractor.config()["dimensions"] == 5  # before the fit: at most
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


def test_pca_axes_are_orthonormal(images) -> None:
    extractor = make_extractor("pixels-pca", components=20)
    extractor.fit(images)
    # Of an image with one white pixel, the features less those of black are that pixel's row of the axes.
    basis = (255 * np.eye(64)).astype(np.uint8).reshape(64, 1, 8, 8)
    axes = (extractor(basis) - extractor(np.zeros_like(basis))).astype(np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(20), atol=1e-5)
    assert abs(extractor(images).mean(0)).max() < 1e-5  # centred on the reference images


def test_pca_is_fitted_to_the_reference_and_not_to_what_it_measures(images) -> None:
    extractor = make_extractor("pixels-pca", components=8)
    extractor.fit(images[:500])
    before = extractor(images[:3])
    extractor(255 - images[500:])
    assert np.array_equal(extractor(images[:3]), before)


def test_efficientnet_of_each_image_alone(images) -> None:
    extractor = make_extractor("efficientnet-lite0", side=64)
    both = extractor(images[[0, 1, 2]])
    np.testing.assert_allclose(extractor(images[[2, 0, 1]]), both[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    assert np.isfinite(both).all()
    assert extractor.config()["resized_to"] == 64
    # Weights from ImageNet are loaded, not drawn: another instance says the same.
    np.testing.assert_allclose(make_extractor("efficientnet-lite0", side=64)(images[:3]), both, rtol=1e-5)


def test_features_are_those_of_a_module_and_every_published_tensor_is_used(images) -> None:
    module = with_random_weights(ModuleInception(narrow=16).eval())
    state = {k: v for k, v in module.state_dict(keep_vars=True).items() if not k.endswith("num_batches_tracked")}
    network = FidInception(state)
    x = torch.tensor(images[:2]).expand(-1, 3, -1, -1)
    features = network(x)
    torch.testing.assert_close(features, module(x))
    assert features.shape == (2, 128)
    features.square().sum().backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert sum(isinstance(m, torch.nn.Conv2d) for m in module.modules()) == 94
    assert not [name for name in state if name.startswith(("AuxLogits", "fc."))]


def test_average_pools_leave_out_the_padding() -> None:
    assert torch.equal(_mean3(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_resizing_down_and_of_oblongs() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    # Rows at 0 and 1.5, columns at 0 and 2.
    assert tf1_resize(x, 2)[0, 0].tolist() == [[0, 2], [6, 8]]
    # 299 of 28: position i·28/299.
    row = torch.arange(28.0).view(1, 1, 1, 28).expand(1, 1, 28, 28)
    expected = (torch.arange(299.0) * 28 / 299).clamp(max=27)
    torch.testing.assert_close(tf1_resize(row, 299)[0, 0, 5], expected, atol=1e-4, rtol=0)


def test_a_download_that_fails_in_any_way_is_told_the_same(monkeypatch) -> None:
    import pooch

    for error in (ValueError("hash of downloaded file does not match"), ConnectionError("reset")):

        def refuse(*args: object, error: Exception = error, **kwargs: object) -> None:
            assert kwargs["known_hash"].startswith("sha256:6726825d")
            raise error

        monkeypatch.setattr(pooch, "retrieve", refuse)
        with pytest.raises(DataError, match="efficientnet-lite0, which work offline"):
            make_extractor("inception")
