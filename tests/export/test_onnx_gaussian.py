"""The Gaussian's denoiser as a graph gives the numbers of the one that it stands for."""

from __future__ import annotations

import pytest
import torch

from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.stages import stage_map
from dpsyngen.diffusion.start import sampling_start
from dpsyngen.export.onnx_gaussian import GaussianGraph


def gaussian(classes: int, rank: int, spherical: bool) -> GaussianDenoiser:
    rng = torch.Generator().manual_seed(classes)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    size = 48
    root = randn(classes, rank, rank) * 0.2
    rest = torch.full((size,), 0.02) if spherical else randn(size).square() * 0.05
    frequencies = torch.arange(1, classes + 1, dtype=torch.float64)
    moments = ClassGaussians(
        means=randn(classes, size) * 0.3,
        basis=torch.linalg.qr(randn(size, rank))[0],
        covariances=root @ root.mT,
        rest=rest.double(),
        frequencies=frequencies / frequencies.sum(),
    )
    return GaussianDenoiser(moments, (3, 4, 4), torch.float64)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize(("classes", "rank"), [(1, 5), (3, 5), (3, 48)])
def test_same_numbers_for_each_class_and_for_none(classes, rank, spherical) -> None:
    model = gaussian(classes, rank, spherical)
    assert model.spherical == spherical
    graph = GaussianGraph(model)
    labels = torch.arange(20) % (classes + 1)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 3, 4, 4, generator=rng, dtype=torch.float64)
    for sigma in (0.01, 0.3, 2.0, 80.0):
        level = torch.full((20,), sigma, dtype=torch.float64)
        x = noise * (sigma + 0.3)
        torch.testing.assert_close(graph(x, level, labels), model(x, level, labels), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(graph.residual_std(level, labels), model.residual_std(level, labels))
        known = labels % classes
        torch.testing.assert_close(graph.draw(noise, known, sigma), model.draw(known, sigma, noise))


@pytest.mark.parametrize("classes", [1, 4])
def test_start_without_a_class_draws_the_same_classes(classes) -> None:
    model = gaussian(classes, 7, False).float()
    stages = stage_map("residual", tau_coarse=1.0)
    sigma, start = sampling_start(stages, model, 0.002, 80.0)
    assert start is not None
    noise = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    unknown = torch.full((200,), classes)
    found = GaussianGraph(model).draw(noise, unknown, sigma)
    torch.testing.assert_close(found, start(noise, None), rtol=1e-4, atol=1e-4)
