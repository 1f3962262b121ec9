"""Our figures equal torch-fidelity's on the same features, and our Inception its on the same images and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.evaluation import frechet_distance, make_extractor
from dpsyngen.evaluation.distances import KernelDistance
from dpsyngen.evaluation.neighbours import Manifold
from tests.evaluation.inception_module import ModuleInception, with_random_weights


def feature_sets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated and real features of unequal number, with unequal means and skewed, correlated coordinates."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(24, 24)) / 5
    a = np.exp(rng.normal(size=(400, 24)) / 2) @ mixing
    b = rng.normal(size=(550, 24)) @ mixing + 0.3
    return a.astype(np.float32), b.astype(np.float32)


def digits() -> tuple[np.ndarray, np.ndarray]:
    train, test = load_images("digits"), load_images("digits:test")
    extractor = make_extractor("pixels-pca", components=32)
    extractor.fit(train.images)
    return extractor(test.images), extractor(train.images)


@pytest.fixture(scope="module", params=["random 0", "random 1", "digits"])
def features(request) -> tuple[np.ndarray, np.ndarray]:
    return digits() if request.param == "digits" else feature_sets(int(request.param[-1]))


def their_frechet(fidelity, a: np.ndarray, b: np.ndarray) -> float:
    statistics = [fidelity.fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    return fidelity.fid.fid_statistics_to_metric(*statistics, False)[fidelity.fid.KEY_METRIC_FID]


def test_frechet_distance(fidelity, features) -> None:
    a, b = features
    assert frechet_distance(a, b) == pytest.approx(their_frechet(fidelity, a, b), rel=1e-5)


@pytest.mark.parametrize(("subsets", "size"), [(100, 200), (7, 50)])
def test_kernel_distance_with_the_same_subsets(fidelity, features, subsets, size) -> None:
    a, b = features
    theirs = fidelity.kid.kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=2020,
        verbose=False,
    )[fidelity.kid.KEY_METRIC_KID_MEAN]
    ours = KernelDistance(b, seed=2020, subsets=subsets, subset_size=size)(a).value
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours != KernelDistance(b, seed=2021, subsets=subsets, subset_size=size)(a).value


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(fidelity, features, k) -> None:
    a, b = features
    theirs = fidelity.prc.prc_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        prc_neighborhood=k,
        prc_batch_size=128,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = Manifold(b, k=k)(a)
    assert 0 < ours["precision"].value < 1
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.slow
def test_inception_on_the_same_images_and_weights(fidelity, tmp_path) -> None:
    """At full width, with random weights in the format of the published file: features, then the distance."""
    network = with_random_weights(ModuleInception())
    state = {**network.state_dict(), "fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    torch.save(state, tmp_path / "w.pth")
    theirs = fidelity.inception.FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=str(tmp_path / "w.pth")
    )
    ours = make_extractor("inception", weights=tmp_path / "w.pth")
    rng = np.random.default_rng(0)
    images = [load_images("digits").images[:4].repeat(3, 1), rng.integers(0, 256, (4, 3, 32, 40), dtype=np.uint8)]
    pairs = [(ours(x), theirs(torch.from_numpy(x))[0].numpy()) for x in images]
    for a, b in pairs:
        assert np.ptp(b) > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    with pytest.warns(UserWarning, match="biased upwards"):
        distance = frechet_distance(pairs[0][0], pairs[1][0])
    # Of what torch-fidelity's own features give in its own arithmetic: on their first 256 numbers, for time's sake.
    with pytest.warns(UserWarning, match="biased upwards"):
        part = frechet_distance(pairs[0][0][:, :256], pairs[1][0][:, :256])
    assert part == pytest.approx(their_frechet(fidelity, pairs[0][1][:, :256], pairs[1][1][:, :256]), rel=1e-3)
    assert 0 < part < distance
