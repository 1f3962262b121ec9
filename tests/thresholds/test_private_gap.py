"""The private gap query: its sensitivity on neighbouring sets, its noise, and what it estimates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.thresholds.gap import GapCurve, mean_curve, measure
from dpsyngen.thresholds.private import GapQuery, PrivateGap, public_clipping_norm
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Shape
from dpsyngen.workers import Workers

LEVELS = (-4.0, -1.0, 1.0, 4.0)


def network(seed: int):
    denoiser = make_denoiser(load_config({"network": {"size": "nano"}}), Shape(8, 1, (), 1), False, seed)
    with torch.no_grad():
        for p in denoiser.parameters():  # a fresh network answers next to nothing
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return denoiser.eval()


@pytest.fixture(scope="module")
def networks():
    return {"teacher": network(1), "student": network(2)}


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def dataset(values: np.ndarray) -> ImageDataset:
    return ImageDataset(values, None, (), "test")


def gap_of(networks, seed: int = 0, workers: Workers | None = None) -> PrivateGap:
    return PrivateGap(networks, LEVELS, math.sqrt(1 / 3), Randomness.from_insecure_seed(seed), workers)


@pytest.mark.parametrize("clip", [0.5, 3.0, 1e6])
def test_sensitivity_on_neighbouring_sets(networks, clip) -> None:
    """Without any one image the sum moves by that image's clipped vector, so by C at most; whatever the image is."""
    extreme = np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), 255)]).astype(np.uint8)
    whole = np.concatenate([images(5), extreme])
    gap, query = gap_of(networks), GapQuery(7, 1.0, clip)
    total = gap.summed(dataset(whole), query)
    assert total.l2_sensitivity <= clip
    moved = []
    for i in range(len(whole)):
        without = gap.summed(dataset(np.delete(whole, i, 0)), query)
        difference = (total.sums[0] - without.sums[0]).numpy()
        alone = gap.summed(dataset(whole[i : i + 1]), query).sums[0].numpy()
        np.testing.assert_allclose(difference, alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())
        moved.append(np.linalg.norm(difference))
    assert max(moved) <= clip * (1 + 1e-6)
    if clip == 0.5:  # all are longer than that, so the bound is met
        assert min(moved) == pytest.approx(clip, rel=1e-4)


def test_the_order_of_the_images_does_not_matter(networks) -> None:
    values, query = images(6), GapQuery(6, 1.0, 2.0)
    gap = gap_of(networks)
    total = gap.summed(dataset(values), query).sums[0]
    turned = gap.summed(dataset(values[::-1].copy()), query).sums[0]
    torch.testing.assert_close(total, turned, rtol=1e-5, atol=1e-6)
    other_key = gap_of(networks, 1).summed(dataset(values), query).sums[0]
    assert not torch.allclose(total, other_key, rtol=1e-3)


def test_an_image_that_breaks_the_networks_contributes_nothing(networks) -> None:
    class Breaks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, sigma, labels=None):
            return torch.where(x[:, :1, :1, :1] > 0, x, x * float("inf"))

    broken = PrivateGap({"a": Breaks(), "b": networks["student"]}, LEVELS, 0.5, Randomness.from_insecure_seed(0))
    total = broken.summed(dataset(images(20)), GapQuery(20, 1.0, 2.0))
    assert 0 < total.not_finite <= 20
    assert torch.isfinite(total.sums[0]).all()


def test_noise_has_the_stated_deviation_and_is_independent_between_entries(networks) -> None:
    query = GapQuery(records=50, noise_multiplier=2.0, clipping_norm=3.0, sampling_rate=0.5)
    assert query.noise == pytest.approx(2 * 3 / 25)
    curves = []
    for seed in range(300):
        gap = gap_of(networks, seed)
        curves.append(gap.released(gap.summed(dataset(images(0)), query), query))
    values = np.array([np.concatenate(c.squares(), 1)[0] for c in curves])
    expected = np.tile(curves[0].noise, 3)
    np.testing.assert_allclose(values.std(0), expected, rtol=0.2)
    np.testing.assert_allclose(values.mean(0) / expected, 0, atol=0.25)
    correlation = np.corrcoef(values.T) - np.eye(values.shape[1])
    assert np.abs(correlation).max() < 0.3
    # In units of the weighted figures all entries have the same noise.
    weights = gap_of(networks).weights.numpy()
    np.testing.assert_allclose(curves[0].noise * weights, query.noise)


def test_mechanism_and_its_cost() -> None:
    query = GapQuery(1000, 4.0, 1.0)
    m = query.mechanism()
    assert (m.sampling_rate, m.noise_multiplier, m.count) == (1.0, 4.0, 1)
    assert GapQuery(1000, 4.0, 1.0, 0.1).mechanism().sampling_rate == 0.1
    sampled = epsilon([GapQuery(1000, 4.0, 1.0, 0.1).mechanism()], 1e-5, "rdp")
    assert sampled < epsilon([m], 1e-5, "rdp") / 3


def test_without_clipping_and_noise_it_is_the_mean_over_the_images(networks) -> None:
    values = images(30)
    gap, query = gap_of(networks, workers=Workers(2)), GapQuery(30, 1e-9, 1e6)
    curve = gap.released(gap.summed(dataset(values), query), query)
    exact = measure(
        networks,
        to_float(torch.from_numpy(values)),
        LEVELS,
        [("teacher", "student")],
        lambda part: torch.stack([gap._blur(image) for image in values[part]]),
    )
    np.testing.assert_allclose(curve.gap[0, 0], exact.gaps["teacher", "student"].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve.teacher_loss[0, 0], exact.losses["teacher"].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve.student_loss[0, 0], exact.losses["student"].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve.relative(), curve.gap[0] / curve.teacher_loss[0])
    np.testing.assert_allclose(curve.excess(), curve.student_loss[0] / curve.teacher_loss[0] - 1)


def test_poisson_sampling_is_unbiased_and_divides_by_the_expected_number(networks) -> None:
    values = images(40)
    whole = GapQuery(40, 1e-9, 1e6)
    exact = gap_of(networks).released(gap_of(networks).summed(dataset(values), whole), whole)
    query = GapQuery(40, 1e-9, 1e6, 0.5)
    drawn, counts = [], []
    for seed in range(30):
        gap = gap_of(networks, seed)
        total = gap.summed(dataset(values), query)
        counts.append(total.examples)
        drawn.append(gap.released(total, query).teacher_loss)
    assert 17 < np.mean(counts) < 23
    assert np.std(counts) > 1.5
    # The key draws the blur of the images, too, so it is compared with the spread.
    error = np.std(drawn, 0) / math.sqrt(30)
    assert (np.abs(np.mean(drawn, 0) - exact.teacher_loss) < 4 * error + 0.02 * exact.teacher_loss).all()


def test_blur_is_standard_normal_and_of_the_content(networks) -> None:
    gap, values = gap_of(networks), images(400)
    blur = torch.stack([gap._blur(v) for v in values])
    assert float(blur.mean()) == pytest.approx(0, abs=0.02)
    assert float(blur.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(gap._blur(values[3]), gap._blur(values[3].copy()))
    assert not torch.equal(blur[0], blur[1])


def test_replicates_have_the_noise_of_the_mechanism() -> None:
    u = np.array(LEVELS)

    def curve(*squares: float) -> GapCurve:
        return GapCurve("private", "t", "s", *(np.full((1, 1, len(u)), square) for square in squares), 0.01 + 0 * u)

    mean = mean_curve([curve(0.05, 0.5, 0.52)], 2000)
    np.testing.assert_allclose(mean.relative.curve, 0.1)
    np.testing.assert_allclose(mean.excess.curve, 0.04)
    np.testing.assert_allclose(mean.relative.drawn.std(0), 0.01 / 0.5, rtol=0.1)
    # Noise may push a square below 0; a ratio stays within what squares allow.
    low = curve(-0.05, -0.5, 0.0)
    assert (low.relative() == 0).all()
    assert np.isfinite(mean_curve([low], 10).relative.drawn).all()


def test_clipping_norm_is_of_public_vectors() -> None:
    vectors = [torch.arange(1.0, 101.0)[:, None].double() * torch.tensor([[0.6, 0.8]]).double()]
    assert public_clipping_norm(vectors) == 90
    assert public_clipping_norm(vectors, 0.25) == 26  # of 25.75, two digits
