"""The Wiener filter: the best of its kind, with the loss that a closed form says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dpsyngen.thresholds.denoisers as denoisers
from dpsyngen.thresholds.denoisers import wiener_filter

LEVELS = (-3.0, -1.0, 0.0, 2.0, 5.0)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Images with a slope, so that their pixels depend on each other."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-60, 60, 16).reshape(1, 4, 4)
    values = 110 + ramp * rng.normal(size=(3000, 1, 1, 1)) + 20 * rng.normal(size=(3000, 1, 4, 4))
    return values.clip(0, 255).astype(np.uint8)


def test_its_loss_is_the_closed_form(images) -> None:
    x = images.reshape(len(images), -1) / 127.5 - 1
    values = np.linalg.eigvalsh(np.cov(x, rowvar=False, bias=True))
    x0 = torch.from_numpy(x).float().view(-1, 1, 4, 4)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    wiener = wiener_filter(images)
    for level in LEVELS:
        sigma, square = torch.full((len(x0),), math.exp(level)), math.exp(2 * level)
        noisy = x0 + sigma[:, None, None, None] * noise
        loss = float((wiener(noisy, sigma) - x0).square().mean())
        assert loss == pytest.approx((values * square / (values + square)).mean(), rel=0.02)


def test_each_row_has_its_own_level(images) -> None:
    x = torch.from_numpy(images[:2] / 127.5 - 1).float()
    d = wiener_filter(images)
    both = d(x, torch.tensor([0.1, 10.0]))
    assert both.shape == x.shape
    torch.testing.assert_close(both[1:], d(x[1:2], torch.tensor([10.0])))


def test_moments_are_the_same_however_many_images_at_a_time(images, monkeypatch) -> None:
    whole = wiener_filter(images)
    monkeypatch.setattr(denoisers, "_CHUNK", 701)
    x, sigma = torch.zeros(1, 1, 4, 4), torch.ones(1)
    torch.testing.assert_close(wiener_filter(images)(x, sigma), whole(x, sigma))


def test_no_wiener_filter_of_large_images(monkeypatch, images) -> None:
    monkeypatch.setattr(denoisers, "MOST_PIXELS", 15)
    assert wiener_filter(images) is None
