"""Scattering features: each image's own, and what the name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsyngen.experiments.dp_classifier import Scattering, _folded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((1, 28, 28), (81, 7, 7)),
        ((1, 8, 8), (81, 2, 2)),
        ((3, 32, 32), (75, 8, 8)),
        ((1, 30, 30), (81, 8, 8)),
        ((3, 64, 64), (75, 8, 8)),
        ((1, 4, 4), (81, 1, 1)),
    ],
)
def test_every_size_has_features_of_the_stated_shape(shape, features) -> None:
    scattering = Scattering(shape)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    out = scattering.of(images)
    assert scattering.features == features
    assert out.shape == (3, *features)
    assert out.dtype == torch.float16
    assert torch.isfinite(out).all()


def test_features_of_an_image_depend_on_no_other() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 12, 12), dtype=np.uint8)
    scattering = Scattering((1, 12, 12))
    together = scattering.of(images)
    for i in range(4):
        assert torch.allclose(together[i], scattering.of(images[i : i + 1])[0], atol=2e-3)
    assert scattering.of(images[:0]).shape == (0, *scattering.features)


def test_wavelets_see_no_constant_and_the_average_keeps_it() -> None:
    scattering = Scattering((1, 16, 16))
    zeroth, first, second = scattering._scattered(torch.full((1, 1, 24, 24), 0.7))
    assert torch.allclose(zeroth, torch.tensor(0.7), atol=1e-5)
    assert first.abs().max() < 1e-5
    assert second.abs().max() < 1e-5


def test_stripes_answer_in_the_wavelets_across_them() -> None:
    scattering = Scattering((1, 32, 32))
    x = torch.cos(0.75 * np.pi * torch.arange(40)).expand(1, 1, 40, 40)
    for image, strongest in ((x, 0), (x.transpose(2, 3), 4)):  # of 8 angles over half a turn
        _, first, _ = scattering._scattered(image.contiguous())
        assert int(first[0, 0, :8].mean((1, 2)).argmax()) == strongest


def test_features_hardly_change_when_an_image_moves_by_a_pixel() -> None:
    image = np.zeros((1, 1, 32, 32), np.uint8)
    image[..., 8:20, 10:18] = 255
    moved = np.roll(image, 1, -1)
    a, b = (Scattering((1, 32, 32)).of(i).float() for i in (image, moved))
    pixels = np.linalg.norm(image / 255.0 - moved / 255.0) / np.linalg.norm(image / 255.0)
    assert float((a - b).norm() / a.norm()) < 0.7 * pixels


def test_folding_a_spectrum_is_keeping_every_second_position() -> None:
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    kept = torch.fft.ifft2(_folded(torch.fft.fft2(x), 2)).real
    assert torch.allclose(kept, x[:, ::2, ::2], atol=1e-5)
