"""The reference predictors: expected losses without drawing noise, and the best of their kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dpsyngen.thresholds.denoisers as references
from dpsyngen.thresholds.denoisers import Moments, as_range, wiener_filter, wiener_loss, zero_information_loss

LEVELS = (-3.0, -1.0, 0.0, 2.0, 5.0)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Images with a slope, so that their pixels hang together."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-60, 60, 16).reshape(1, 4, 4)
    values = 110 + ramp * rng.normal(size=(3000, 1, 1, 1)) + 20 * rng.normal(size=(3000, 1, 4, 4))
    return values.clip(0, 255).astype(np.uint8)


def test_moments_are_those_of_numpy_however_many_at_a_time(images, monkeypatch) -> None:
    monkeypatch.setattr(references, "_CHUNK", 701)
    m, x = Moments.of(images), as_range(images)
    np.testing.assert_allclose(m.mean, x.mean(0))
    np.testing.assert_allclose(m.covariance, np.cov(x, rowvar=False, bias=True), atol=1e-12)
    assert m.level == pytest.approx(x.mean())
    assert m.variance == pytest.approx(x.var())
    assert (x.min(), x.max()) >= (-1, -1)


def test_expected_losses_are_those_of_drawn_noise(images) -> None:
    m, x = Moments.of(images), as_range(images)[:500]
    rng = np.random.default_rng(1)
    zero, wiener = zero_information_loss(images[:500], m, LEVELS), wiener_loss(images[:500], m, LEVELS)
    for k, level in enumerate(LEVELS):
        sigma = math.exp(level)
        noisy = x + sigma * rng.standard_normal((40, *x.shape))
        a = m.variance / (m.variance + sigma**2)
        filtered = m.covariance @ np.linalg.inv(m.covariance + sigma**2 * np.eye(16))
        for losses, answer in ((zero, m.level + a * (noisy - m.level)), (wiener, m.mean + (noisy - m.mean) @ filtered)):
            drawn = np.square(answer - x).mean((0, 2))
            assert drawn.mean() == pytest.approx(losses[:, k].mean(), rel=0.02)


def test_wiener_is_the_closed_form_on_its_own_images_and_the_better_one(images) -> None:
    m = Moments.of(images)
    values = np.linalg.eigvalsh(m.covariance)
    zero, wiener = zero_information_loss(images, m, LEVELS), wiener_loss(images, m, LEVELS)
    for k, level in enumerate(LEVELS):
        square = math.exp(2 * level)
        assert wiener[:, k].mean() == pytest.approx((values * square / (values + square)).mean(), rel=1e-9)
        v = m.variance
        assert zero[:, k].mean() == pytest.approx(v * square / (v + square), rel=1e-9)
        assert wiener[:, k].mean() < zero[:, k].mean()


def test_wiener_filter_as_a_denoiser_has_that_loss(images) -> None:
    m = Moments.of(images)
    x = torch.from_numpy(as_range(images)).float().view(-1, 1, 4, 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for k, level in enumerate(LEVELS):
        sigma = torch.full((len(x),), math.exp(level))
        answer = wiener_filter(m, (1, 4, 4))(x + sigma[:, None, None, None] * noise, sigma, None)
        assert answer.shape == x.shape
        assert float((answer - x).square().mean()) == pytest.approx(
            wiener_loss(images, m, LEVELS)[:, k].mean(), rel=0.02
        )
    # Each row at its own level.
    both = wiener_filter(m, (1, 4, 4))(x[:2], torch.tensor([0.1, 10.0]))
    torch.testing.assert_close(both[1:], wiener_filter(m, (1, 4, 4))(x[1:2], torch.tensor([10.0])))


def test_no_wiener_filter_of_large_images(monkeypatch, images) -> None:
    monkeypatch.setattr(references, "MOST_PIXELS", 15)
    m = Moments.of(images)
    assert m.covariance is None
    assert wiener_loss(images, m, LEVELS) is None
    with pytest.raises(ValueError, match="more than 15 pixels"):
        wiener_filter(m, (1, 4, 4))
    assert zero_information_loss(images, m, LEVELS).shape == (3000, 5)
